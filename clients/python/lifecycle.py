"""The life of one VM, from its creation to its deletion."""

import grpc
from vmm.v1 import vm_pb2 as pb

from api import TIMEOUT, config, refused, vms
from checks import KERNEL, MEMORY, equal


def lifecycle() -> None:
    vm = {"vm_id": "python-grpc"}

    # Step 1: CreateVm records the VM.
    request = pb.CreateVmRequest(**vm, config=config(KERNEL, metadata={"made_by": "python-grpc"}))
    created = vms.CreateVm(request, timeout=TIMEOUT)
    equal((created.vm_id, created.state), ("python-grpc", pb.VM_STATE_CREATED))
    look(pb.VM_STATE_CREATED)

    # Step 2: PauseVm is refused before the boot.
    refused(grpc.StatusCode.FAILED_PRECONDITION, vms.PauseVm, pb.PauseVmRequest(**vm))

    # Step 3: BootVm starts the guest.
    expect(vms.BootVm, pb.BootVmRequest(**vm), pb.VM_STATE_RUNNING)

    # Step 4: BootVm of a running VM has nothing to do.
    expect(vms.BootVm, pb.BootVmRequest(**vm), pb.VM_STATE_RUNNING)
    look(pb.VM_STATE_RUNNING)

    # Step 5: PauseVm stops the guest's processors.
    expect(vms.PauseVm, pb.PauseVmRequest(**vm), pb.VM_STATE_PAUSED)

    # Step 6: ResumeVm starts the processors again.
    expect(vms.ResumeVm, pb.ResumeVmRequest(**vm), pb.VM_STATE_RUNNING)

    # Step 7: RebootVm starts the guest anew.
    expect(vms.RebootVm, pb.RebootVmRequest(**vm, force=True), pb.VM_STATE_RUNNING)

    # Step 8: ShutdownVm ends the guest.
    expect(vms.ShutdownVm, pb.ShutdownVmRequest(**vm, force=True), pb.VM_STATE_SHUTDOWN)
    look(pb.VM_STATE_SHUTDOWN)

    # Step 9: BootVm starts the guest again.
    expect(vms.BootVm, pb.BootVmRequest(**vm), pb.VM_STATE_RUNNING)

    # Step 10: DeleteVm of a running VM is refused without force.
    refused(grpc.StatusCode.FAILED_PRECONDITION, vms.DeleteVm, pb.DeleteVmRequest(**vm))

    # Step 11: DeleteVm with force removes the VM.
    equal(vms.DeleteVm(pb.DeleteVmRequest(**vm, force=True), timeout=TIMEOUT).success, True)

    # Step 12: GetVmInfo does not find the VM.
    refused(grpc.StatusCode.NOT_FOUND, vms.GetVmInfo, pb.GetVmInfoRequest(**vm))


def expect(method: grpc.UnaryUnaryMultiCallable, request: object, state: int) -> None:
    """Calls a method that changes the state, and checks its answer."""
    answer = method(request, timeout=TIMEOUT)
    equal((answer.success, answer.state), (True, state))


def look(state: int) -> None:
    """Reads the VM by both reads."""
    info = vms.GetVmInfo(pb.GetVmInfoRequest(vm_id="python-grpc"), timeout=TIMEOUT)
    found = (info.state, info.config.memory.size_bytes, info.config.boot.kernel_path)
    equal(found, (state, MEMORY, KERNEL))
    request = pb.ListVmsRequest(state_filter=[state], metadata_filter={"made_by": "python-grpc"})
    listed = vms.ListVms(request, timeout=TIMEOUT)
    equal((listed.total_count, [vm.vm_id for vm in listed.vms]), (1, ["python-grpc"]))
