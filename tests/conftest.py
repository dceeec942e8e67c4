"""What comes before any test file is read."""

import pytest
from hypothesis import settings

# An example that takes longer than the usual 200 ms says only that the machine is busy.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

pytest.register_assert_rewrite("hornbeam_state.contract")
