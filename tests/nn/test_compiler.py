"""A first defense, attack and evaluation do not load torch's compiler, which takes seconds."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

START = """
import sys, time
import torch
import probdefense as pd
net, x, y = pd.models.small_cnn(), torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
start = time.process_time()
defense = {build}
seconds = time.process_time() - start
{use}
print(seconds, [name for name in ("torch._dynamo", "sympy", "torch.onnx") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("build", "use"),
    [
        ("pd.defenses.rse(net)", "pd.evaluate(defense, (x, y), {'fgsm': pd.attacks.fgsm}, eps=0.1)"),
        ("pd.defenses.jump_relu(net, kappa=0.1)", "pd.attacks.apgd(defense, x, y, eps=0.1, num_steps=2)"),
        ("pd.defenses.mc_dropout(net, rate=0.1)", "pd.predict(defense, x)"),
        (
            "pd.defenses.rse(pd.defenses.bayesian(net, num_data=4))",
            "defense.drawn(x.requires_grad_(), 3, seed=0, max_batch=2).sum().backward()",
        ),
    ],
)
def test_a_first_defense_and_its_attack_load_no_compiler(build, use):
    code = START.format(build=build, use=use)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = answer.stdout.strip().split(" ", 1)
    assert loaded == "[]"
    assert float(seconds) < 0.3


def test_the_compiler_is_seen_where_it_is_loaded():
    code = START.format(build="torch.empty(1, device='meta') + 1", use="")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip().endswith("]") and not answer.stdout.strip().endswith(" []")
