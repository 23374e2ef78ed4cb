#!/usr/bin/env python3
"""Records a real run of the daemon with three hypervisors, and draws the recording as docs/run.svg for the README.

    daemon up ──► STEPS, typed into one bash ──► text with times ──► SVG whose lines appear in that order

Needs a built daemon (VMCP_DAEMON, ./vmm-controlplane by default), the three hypervisors, jq, column and cargo. Everything that the script
makes is in one temporary folder. VMs and daemons are ended by pid at every end of the script.
"""

import contextlib
import html
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
DAEMON = pathlib.Path(os.environ.get("VMCP_DAEMON", ROOT / "vmm-controlplane")).resolve()

# The functions of the recorded shell. The daemon writes its log to a file, so that the recording shows the commands.
PRELUDE = r"""
set -u
cd "$WORK"
daemon() { "$DAEMON" > daemon.log 2>&1 & echo $! > daemon.pid; disown; until curl -sf localhost:$UNKEY_VMCP_PORT/_/health > up; do sleep 0.05; done; }
vmm() { curl -s localhost:$UNKEY_VMCP_PORT/vmm.v1.VmService/$1 -H 'Content-Type: application/json' -d "$2"; }
list() { vmm ListVms '{}' | jq -r '.vms[] | [.vm_id, .backend, (.state | ltrimstr("VM_STATE_")), .status.phase, .status.reason // "-"] | @tsv' | column -t; }
"""

CREATE = """vmm CreateVm '{"vm_id": "vm-'$b'", "backend": "'$b'", "config": '"$C"'}'"""
BOOT = """vmm BootVm '{"vm_id": "vm-'$b'"}'; echo"""
LOOP = "for b in qemu cloudhypervisor firecracker; do\n    {create}\n    {boot}\n  done"
# Pairs of the text that is shown and the command that is run, which is the text itself where it is None.
STEPS = [
    ("# vmm METHOD JSON: curl to /vmm.v1.VmService/METHOD.  list: ListVms through jq.", ":"),
    ("./vmm-controlplane &", "daemon"),
    ("""C='{"cpu": {"vcpu_count": 1}, "memory": {"size_bytes": 134217728}}'""", None),
    (LOOP.format(create=CREATE, boot=BOOT), LOOP.format(create=CREATE + " > created", boot=BOOT)),
    ("list", None),
    ("# The daemon is killed, and one VMM dies while no daemon runs.", ":"),
    ("kill -9 $(pidof vmm-controlplane)", "kill -9 $(cat daemon.pid)"),
    ("kill -9 $(pidof firecracker)", 'kill -9 $(pgrep -f "firecracker.*$WORK")'),
    ("./vmm-controlplane &", "daemon"),
    ("list", None),
    ("""vmm BootVm '{"vm_id": "vm-firecracker"}'; echo""", None),
    ("list", None),
]


def record(work):
    """Runs the steps in one bash, and returns the shown lines as pairs of kind and text."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    shell = subprocess.Popen(["bash"], text=True, env=environment(work), **pipes)
    shell.stdin.write(PRELUDE)
    lines = []
    for shown, run in STEPS:
        lines += [("typed", line) for line in shown.splitlines()]
        shell.stdin.write(f"{run or shown}\necho\necho @@done\n")
        shell.stdin.flush()
        output = []
        for line in shell.stdout:
            if line == "@@done\n":
                break
            output.append(line.rstrip("\n"))
        else:
            sys.exit("error: the recorded shell has ended; is the daemon built, and are the hypervisors installed?")
        lines += [("said", line) for line in output if line]
    shell.stdin.close()
    shell.wait()
    return lines


def environment(work):
    """Returns the environment of the recorded shell, and so of the daemon."""
    command = ["cargo", "run", "-q", "-p", "vmm-testkit", "--bin", "tiny-guests", "--", work / "guests"]
    guests = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    idle = next(line.split("\t")[0] for line in guests.stdout.splitlines() if "idle" in line.split("\t")[0])
    return {
        **os.environ,
        "WORK": str(work),
        "DAEMON": str(DAEMON),
        "UNKEY_VMCP_BACKEND": "qemu",
        "UNKEY_VMCP_PORT": "18085",
        "UNKEY_VMCP_STATE_DIR": str(work / "state"),
        "UNKEY_VMCP_RUNTIME_DIR": str(work / "run"),
        "UNKEY_VMCP_DEFAULT_KERNEL": idle,
        "UNKEY_VMCP_QEMU_KVM": "false",
    }


def draw(lines):
    """Returns the SVG. Each line appears a moment after the one before, and the drawing stays when all lines are shown."""
    width, height, top = 760, 19, 52
    parts, at = [], 0.4
    for number, (kind, text) in enumerate(lines):
        at += 0.9 if kind == "typed" else 0.15
        first = kind == "typed" and not text.startswith("  ")
        prompt = '<tspan class="p">$ </tspan>' if first and not text.startswith("#") else ""
        style = "c" if text.startswith("#") else "t" if kind == "typed" else "o"
        y = top + number * height
        parts.append(f'<text xml:space="preserve" class="{style}" x="20" y="{y}" style="animation-delay:{at:.2f}s">{prompt}{html.escape(text)}</text>')
    tall = top + len(lines) * height + 12
    css = (
        "text{font:14px ui-monospace,Menlo,Consolas,monospace;white-space:pre;opacity:0;animation:show .1s forwards}"
        "@keyframes show{to{opacity:1}}"
        "@media (prefers-reduced-motion:reduce){text{animation:none;opacity:1}}"
        ".p{fill:#7ee787}.t{fill:#e6edf3}.o{fill:#9da7b3}.c{fill:#79c0ff}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" width="{width}" height="{tall}" role="img" '
        'aria-label="A terminal: three VMs on three hypervisors outlive the daemon">\n'
        f"<style>{css}</style>\n"
        f'<rect width="{width}" height="{tall}" rx="10" fill="#0d1117"/>\n'
        '<circle cx="22" cy="20" r="6" fill="#ff5f56"/><circle cx="42" cy="20" r="6" fill="#ffbd2e"/><circle cx="62" cy="20" r="6" fill="#27c93f"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def end_all(work):
    """Kills every process whose command line names the temporary folder, and the daemon."""
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((work / "daemon.pid").read_text()), signal.SIGKILL)
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{work}/".encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


def main():
    if not DAEMON.exists():
        sys.exit(f"error: {DAEMON} does not exist; run 'make build', or set VMCP_DAEMON")
    with tempfile.TemporaryDirectory(prefix="vmcp-run.") as folder:
        work = pathlib.Path(folder)
        try:
            lines = record(work)
        finally:
            end_all(work)
    (ROOT / "docs/run.svg").write_text(draw(lines), encoding="utf-8")
    for _, line in lines:
        print(line)


if __name__ == "__main__":
    main()
