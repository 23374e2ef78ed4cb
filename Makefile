# The commands of a newcomer. Each target does everything that it needs, and skips what is already done.

.DEFAULT_GOAL := help
.PHONY: help setup build deb libvirt-helper demo test bench fuzz chaos conformance sdk

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

setup: ## install what is missing and prepare the guest that demo and tests boot
	@scripts/setup.sh

# The commit that --version, health and logs name. Other targets do not set it, because each change of it builds the daemon again.
build deb: export VMM_BUILD_COMMIT ?= $(shell git describe --always --dirty --abbrev=12 --exclude '*' 2> /dev/null)

build: ## build the daemon, ./vmm-controlplane, and the command line, ./vmcp
	cargo build --release -p vmm-controlplane -p vmcp
	@# A rename, because a running program's file cannot be written to.
	@for program in vmm-controlplane vmcp; do \
		cp "$${CARGO_TARGET_DIR:-target}/release/$$program" $$program.new && mv -f $$program.new $$program || exit 1; \
	done
	@# The daemon does not link libvirt. The helper is built only if libvirt is installed.
	@if pkg-config --exists libvirt libvirt-qemu 2> /dev/null; then $(MAKE) --no-print-directory libvirt-helper; fi

libvirt-helper: ## build ./vmm-libvirt-helper, which links libvirt (package libvirt-dev)
	cargo build --release --manifest-path crates/vmm-libvirt-helper/Cargo.toml \
		--target-dir "$${CARGO_TARGET_DIR:-target}/libvirt-helper"
	@cp "$${CARGO_TARGET_DIR:-target}/libvirt-helper/release/vmm-libvirt-helper" vmm-libvirt-helper.new
	@mv -f vmm-libvirt-helper.new vmm-libvirt-helper

deb: build ## build target/deb/vmm-controlplane_VERSION_ARCH.deb with daemon, vmcp, unit, manual pages and completions
	@scripts/deb.sh

demo: setup build ## boot a guest through the API and watch its console; ONCE=1 ends by itself
	@scripts/demo.sh

test: setup ## run every check and test; the last line counts them
	@scripts/test.sh

conformance: setup ## run the Connect conformance suite against the daemon's HTTP server; needs Go, and prints the number of cases
	@cargo test --quiet -p vmm-conformance --test connect -- --nocapture

bench: setup ## measure CreateVm + BootVm against each VMM by hand, consoles, and 100,000 VMs against 100; print the ratios
	@cargo bench -p vmm-controlplane --bench boot
	@cargo bench -p vmm-controlplane --bench console
	@cargo bench -p vmm-controlplane --bench scale

fuzz: ## search for input that breaks a promise, ten minutes for each target; FUZZ_SECONDS=60 for less
	@scripts/fuzz.sh

chaos: setup ## kill the daemon 200 times under load, and create and delete 1,000 VMs on each hypervisor (10 minutes)
	@VMCP_CHAOS_KILLS=$${VMCP_CHAOS_KILLS:-200} VMCP_CHAOS_CYCLES=$${VMCP_CHAOS_CYCLES:-1000} \
		cargo test -p vmm-controlplane --test chaos -- --nocapture --test-threads=1 randomised cycles

sdk: setup ## generate the API's packages for Go, TypeScript and Python, in target/sdk
	@scripts/sdk.sh
