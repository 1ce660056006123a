# Hypernetes. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export HYPERNETES_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/hypernetes
export CARGO_TERM_COLOR ?= auto
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))

.PHONY: help
help: ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.PHONY: deps
deps: ## Install what is needed from Debian's packages
	scripts/install-deps

.PHONY: kernel
kernel: deps ## Build HyperKernel (cached by content) and print where it is
	kernel/build

.PHONY: build
build: deps ## Build the daemon, hyper, the guest's program and the kernel
	cargo build --locked --release -p hypernetes -p hypernetes-hyper
	crates/hyperstart/build-guest $(TARGET)/release
	kernel/build > $(TARGET)/release/kernel-path

.PHONY: demo
demo: build ## Two tenants, real VMs, real kubectl, in seven steps; KEEP=1 leaves it running
	scripts/demo $(if $(KEEP),--keep)

.PHONY: test
test: build ## Every test: units, crates, real VMs, real kubectl
	scripts/test

.PHONY: lint
lint: ## Format, clippy, licences
	scripts/install-deps --lint
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo deny --offline --locked check --hide-inclusion-graph bans licenses sources

.PHONY: bench
bench: build ## Start-up, memory, API rates and more, as ratios to floors measured in the same run
	scripts/install-deps --bench
	scripts/bench

.PHONY: clean-demo
clean-demo: ## Stop what `make demo KEEP=1` left running and remove its state
	scripts/demo --clean
