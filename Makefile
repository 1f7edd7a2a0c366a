# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
#
# make setup    leaves .venv/bin/forebay (system packages through root or sudo, only those missing)
# make setup-libvirt   what the tests under a real libvirt need as well, 300 MB; make test runs them then
# make test     all levels but the lab        PYTEST_ARGS='-k name' narrows it   WORKERS=2: files side by side
# make test-without-core   the tests that reach the compiled core, served by Python
# make demo     everything on a throw-away directory
# make bench    against nbdkit and qemu-nbd   ROUNDS=5  QUICK=1  BENCH_ARGS="--only qd16"
# make bench-boot    boots of a real Linux, and storms of its reads; half an hour   BENCH_ARGS="--only storm --storms 1,25"
# make bench-doors   socket, FUSE file, nbdfuse, sshfs, plain file     QUICK=1  BENCH_ARGS="--only read"
# make bench-policy      what the placement finds, against other policies; how far off the advice is; ten minutes
# make bench-overlays    what a thousand overlays cost; exit code 1 where a bar is missed
# make bench-stage   an image to eight gateways, each held to a rate, and a simulation of thousands   BENCH_ARGS="--size 4096 --links 60"
# make fuzz     what reads bytes from outside, with atheris     SECONDS=600  TARGETS="server client"
# make fuzz-sanitized   the compiled core under AddressSanitizer and UBSan     SECONDS=60, for each target
# make soak     kills, faults and changes, with guests that check all they read     SECONDS=3600  KILLS=2000  POINTS=1  SEED=
# make lab      a file server and two hosts, emulated: what only real NFS shows   LAB="takeover"  LAB=all  LAB=--list  LAB_CORES=1
# make docs     all pages as a site in build/site; a broken link fails
# make dist     wheel and sdist in dist/, and a look at what is in them
# make deb      a package for Debian in dist/   VERSION=  MAINTAINER="NAME <MAIL>"
# make try-install   a minimal Debian of its own, with make install and the demo in it   SUITE=trixie
# make lock     requirements.lock and requirements-stage.lock anew: the versions that packages carry
# make lint     ruff, mypy, shellcheck
# make install  puts it into this host, with systemd units   PREFIX=/usr/local  DESTDIR=  (and: make uninstall)

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
ROUNDS ?= 5
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
# only what exists: a source root may be empty in an early checkout
SOURCES := $(wildcard gateway nbd cache fast bench tests tools config hatch_build.py)
SHELL_SCRIPTS := packaging/debian/postinst packaging/debian/prerm packaging/debian/postrm config/opennebula/install.sh config/opennebula/remotes/im/kvm-probes.d/host/system/forebay.sh \
  config/libvirt/qemu-forebay config/libvirt/hooks/qemu.d/forebay config/proxmox/install.sh

export VENV
# tools that look for python3 on PATH (nbdkit's embedded interpreter does) find the environment
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: setup setup-libvirt test test-without-core test-unit test-sim test-real demo bench bench-boot bench-boot-readme bench-readme bench-profile bench-doors bench-doors-readme bench-threads bench-policy bench-overlays bench-stage fuzz fuzz-sanitized soak lab docs dist deb try-install lock lint format install uninstall clean

setup:
	@tools/setup.sh

setup-libvirt: setup
	@tools/setup-libvirt.sh

test: setup
	@start=$$SECONDS; $(BIN)/python -m pytest --durations=5 --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS); rc=$$?; \
	echo "make test: $$((SECONDS - start)) s"; exit $$rc

test-unit test-sim test-real: test-%: setup
	$(BIN)/python -m pytest tests/$* $(PYTEST_ARGS)

# Four minutes. The others do the same either way.
test-without-core: setup
	FOREBAY_CORE=0 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/sim/test_cache_crash.py tests/sim/test_data_safety.py \
	  tests/sim/test_disk_machine.py tests/sim/test_nth_call.py tests/real/test_nbd_life.py tests/real/test_nbd_slow_clients.py \
	  tests/real/test_fuse.py

demo: setup
	$(BIN)/forebay demo

bench: setup
	PYTHONPATH=tests $(BIN)/python -m bench --rounds $(ROUNDS) $(if $(QUICK),--quick) $(BENCH_ARGS)

bench-boot: setup
	PYTHONPATH=tests $(BIN)/python -m bench.boot $(BENCH_ARGS)

bench-boot-readme: setup
	PYTHONPATH=tests $(BIN)/python -m bench.boot --readme

# puts what the last run kept into bench/README.md
bench-readme: setup
	PYTHONPATH=tests $(BIN)/python -m bench --readme

bench-profile: setup
	PYTHONPATH=tests $(BIN)/python -m bench.profile $(BENCH_ARGS)

# five minutes; cache/THREADS.md
bench-threads: setup
	$(BIN)/python -m bench.threads $(BENCH_ARGS)

# bench/POLICY.md, which BENCH_ARGS=--readme writes anew
bench-policy: setup
	@$(BIN)/python -c 'import libcachesim' 2>/dev/null || FOREBAY_CORE_PLANTS=1 $(BIN)/python -m pip install --quiet --editable '.[policy]'
	PYTHONPATH=tests $(BIN)/python -m bench.policy $(BENCH_ARGS)

bench-overlays: setup
	PYTHONPATH=tests $(BIN)/python -m bench.overlays $(BENCH_ARGS)

bench-stage: setup
	PYTHONPATH=tests $(BIN)/python -m bench.staging $(BENCH_ARGS)

# needs sshfs, openssh-server and nbdfuse, and says which of them is missing
bench-doors: setup
	PYTHONPATH=tests $(BIN)/python -m bench.doors --rounds $(ROUNDS) $(if $(QUICK),--quick) $(BENCH_ARGS)

bench-doors-readme: setup
	PYTHONPATH=tests $(BIN)/python -m bench.doors --readme

# SECONDS in all; tests/fuzz/README.md
fuzz: setup
	@$(BIN)/python -c 'import atheris' 2>/dev/null || FOREBAY_CORE_PLANTS=1 $(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	PYTHONPATH=tests $(BIN)/python -m fuzz.run --seconds $(or $(SECONDS),60) $(TARGETS)

# compiles another core, in build/; needs gcc's libasan
fuzz-sanitized: setup
	PYTHONPATH=tests $(BIN)/python -m fuzz.sanitized --seconds $(or $(SECONDS),60) $(TARGETS)

# exit code 1 on a loss, with the seed and a directory that is kept; tests/README.md
soak: setup
	PYTHONPATH=tests $(BIN)/python -m soak --seconds $(or $(SECONDS),3600) $(if $(KILLS),--kills $(KILLS)) \
	  $(if $(POINTS),--points) $(if $(SEED),--seed $(SEED))

# root, and Debian packages that it installs; tests/lab/README.md
lab: setup
	@PYTHONPATH=tests $(BIN)/python -m lab $(LAB)

docs: setup
	@$(BIN)/python -c 'import mkdocs, pymdownx' 2>/dev/null || FOREBAY_CORE_PLANTS=1 $(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m mkdocs build --quiet

deb: setup
	@tools/deb.sh

# root, debootstrap, systemd-nspawn; five minutes
try-install:
	@tools/try-install.sh

lock:
	@tools/lock.sh

dist:
	@tools/dist.sh

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/mypy bench tests tools
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

format: setup
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# PREFIX, DESTDIR, ENVIRONMENT, PYTHON: tools/install.sh
install uninstall:
	@tools/install.sh $@

clean:
	rm -f fast/forebay_fast/core.c fast/forebay_fast/*.so fast/forebay_fast/.*.of
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find gateway nbd cache fast tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
