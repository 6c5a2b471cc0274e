"""Every method in every domain learns: its features beat the untrained encoder's by more than noise gives."""

import pytest
from matrix_cells import DOMAIN_CELLS, METHODS, NO_GAIN, flags, margin, metric, run_cell


@pytest.mark.parametrize("domain_name", DOMAIN_CELLS)
@pytest.mark.parametrize("method_name", METHODS)
def test_every_method_learns_in_every_domain(tmp_path, method_name, domain_name):
    if (method_name, domain_name) in NO_GAIN:
        pytest.skip(NO_GAIN[method_name, domain_name])
    outcome = run_cell(flags(method_name, domain_name), domain_name, tmp_path)
    score = metric(domain_name)
    print(
        f"{method_name} {domain_name} {score}: {outcome.before[score]:.4f} -> {outcome.after[score]:.4f} "
        f"in {outcome.seconds:.1f} s"
    )
    assert outcome.gain(score) > margin(method_name, domain_name)
