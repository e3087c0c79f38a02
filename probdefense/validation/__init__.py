"""The public border: every message says what was expected, what came and what to do.

A check returns what it was given in the form that the library works with: Python's numbers for those of
NumPy and for tensors of one number, pixels that rounding carried out of the box on its edge.
"""

from probdefense.validation.settings import (
    check_attack,
    check_count,
    check_eps,
    check_function,
    check_kind,
    check_member,
    check_norm,
    check_number,
    check_positive,
    check_seed,
    check_seeds,
    check_share,
    kind_of,
    plain,
)
from probdefense.validation.tensors import (
    check_answer,
    check_classes,
    check_examples,
    check_finite_logits,
    check_inputs,
    check_label_form,
    check_labels,
    check_like,
    check_log_probs,
    check_logits,
    check_num_classes,
    check_output,
    check_values,
    check_vector,
)

__all__ = [
    "check_answer",
    "check_attack",
    "check_classes",
    "check_count",
    "check_eps",
    "check_examples",
    "check_finite_logits",
    "check_function",
    "check_inputs",
    "check_kind",
    "check_label_form",
    "check_labels",
    "check_like",
    "check_log_probs",
    "check_logits",
    "check_member",
    "check_norm",
    "check_num_classes",
    "check_number",
    "check_output",
    "check_positive",
    "check_seed",
    "check_seeds",
    "check_share",
    "check_values",
    "check_vector",
    "kind_of",
    "plain",
]
