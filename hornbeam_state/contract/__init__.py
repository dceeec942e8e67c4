"""The contract that every backend passes, as tests; see `hornbeam_state.testing`."""

from hornbeam_state.contract.keyspaces import KeyspaceContract
from hornbeam_state.contract.locks import LockContract
from hornbeam_state.contract.messages import MessageContract
from hornbeam_state.contract.whole import BackendContract

__all__ = ["BackendContract", "KeyspaceContract", "LockContract", "MessageContract"]
