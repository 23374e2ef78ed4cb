"""A watch: the present states, then each change as it is made."""

from vmm.v1 import vm_pb2 as pb

from api import TIMEOUT, config, vms
from checks import KERNEL


def watch() -> None:
    vm = {"vm_id": "python-watch"}
    stream = vms.WatchVms(pb.WatchVmsRequest(), timeout=20)

    def until(kind: str, of: str) -> None:
        for event in stream:
            if (event.type, event.vm_id) == (kind, of):
                return
        raise AssertionError(f"the stream ended before the event {kind!r}")

    # Step 1: WatchVms sends the present states, then the event "synced".
    until("synced", "")

    # Step 2: CreateVm is the event "created".
    vms.CreateVm(pb.CreateVmRequest(**vm, config=config(KERNEL)), timeout=TIMEOUT)
    until("created", "python-watch")

    # Step 3: DeleteVm is the event "deleted".
    vms.DeleteVm(pb.DeleteVmRequest(**vm, force=True), timeout=TIMEOUT)
    until("deleted", "python-watch")
    stream.cancel()
