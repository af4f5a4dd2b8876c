"""Examples in docstrings produce the output that they show."""

import doctest
from importlib import import_module

import pytest

import stepwise_lightning

PUBLIC = ["stepwise_lightning", *(f"stepwise_lightning.{name}" for name in ("data", "plots", "spectrum", "theory"))]


def examples() -> dict[str, doctest.DocTest]:
    """Return the examples of all exported names, without duplicates."""
    tests = {}
    for package in map(import_module, PUBLIC):
        for name in package.__all__:
            exported = getattr(package, name)
            if not hasattr(exported, "__doc__") or not callable(exported):
                continue
            module = import_module(exported.__module__)
            for test in doctest.DocTestFinder().find(exported, name, module=module, globs={}):
                if test.examples:
                    tests[f"{module.__name__}.{test.name}"] = test
    return tests


EXAMPLES = examples()


def test_losses_steps_and_theory_have_examples():
    for name in ("losses.barlow_twins_loss", "spectrum.steps.detect_steps", "theory.contrastive.ContrastiveKernelPCA"):
        assert f"{stepwise_lightning.__name__}.{name}" in EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, capsys):
    assert doctest.DocTestRunner(verbose=False).run(EXAMPLES[name]).failed == 0, capsys.readouterr().out
