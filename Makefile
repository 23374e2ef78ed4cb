# What a newcomer types. Each target does all that it needs, and is quick when that is done already.

.DEFAULT_GOAL := help
.PHONY: help setup build demo test bench

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

setup: ## install what is missing and prepare the guest that demo and tests boot
	@scripts/setup.sh

build: ## build the daemon, ./vmm-controlplane
	cargo build --release -p vmm-controlplane
	@# A rename, because a running daemon's file cannot be written to.
	@cp "$${CARGO_TARGET_DIR:-target}/release/vmm-controlplane" vmm-controlplane.new
	@mv -f vmm-controlplane.new vmm-controlplane

demo: setup build ## boot a guest through the API and watch its console; ONCE=1 ends by itself
	@scripts/demo.sh

test: setup ## run every check and test; the last line counts them
	@scripts/test.sh

bench: setup ## CreateVm + BootVm against driving each VMM by hand: prints the ratios
	@cargo bench -p vmm-controlplane --bench boot
