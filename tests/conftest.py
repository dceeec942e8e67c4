"""What comes before any test file is read."""

import pytest

pytest.register_assert_rewrite("hornbeam_state.contract")
