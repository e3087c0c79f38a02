"""What an evaluation holds in memory does not grow with images times draws."""

import subprocess
import sys

import pytest

CODE = """
import torch, probdefense as pd
torch.manual_seed(0)
defense = pd.defenses.rse(pd.models.resnet20()).eval()
x, y = torch.rand({images}, 3, 32, 32), torch.randint(10, ({images},))
attacks = {{"fgsm": pd.with_draws(pd.attacks.fgsm, 16)}}
report = pd.evaluate(defense, (x, y), attacks, eps=8 / 255, num_samples=5, **{options})
# Its own peak: that of getrusage is at least the parent's.
peak = next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line)
print(peak, report.rows[-1]["gradients"])
"""


def peak(images, **options):
    """Peak memory in MB, and gradients spent."""
    code = CODE.format(images=images, options=options)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after, gradients = (int(word) for word in answer.stdout.split())
    return after / 1024, gradients


@pytest.mark.slow
def test_a_resnet_with_noise_everywhere_is_evaluated_in_bounded_memory():
    """Held at once the graphs of 80 images and 16 draws would take 4 GB."""
    megabytes, gradients = peak(80)
    assert gradients == 80 * 16
    assert megabytes < 1500
    small, _ = peak(80, draw_chunk=32)
    assert small < megabytes
