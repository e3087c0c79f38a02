"""NumPyro: posteriors of JAX networks under attack, and NUTS as the gold standard beside SVI."""

from probdefense.numpyro.bridge import Bridge, bridge
from probdefense.numpyro.nuts import Gap, compare_to_gold, last_layer_nuts, nuts

__all__ = ["Bridge", "Gap", "bridge", "compare_to_gold", "last_layer_nuts", "nuts"]
