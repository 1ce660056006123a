//! End-to-end tests: each file drives the real daemon, the real kubectl and real VMs.
