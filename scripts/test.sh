#!/usr/bin/env bash
# Runs every test. Used by "make test" and so by continuous integration.
set -euo pipefail
cd "$(dirname "$0")/.."
go=${GO:-go}
# Two packages at a time: the tests of the real binary measure time, and the
# machine may have two cores only.
$go test -p 2 -timeout 20m ./...
# The same simulation with known protocol bugs switched on must find each.
$go test -timeout 10m -tags atollbugs -run 'TestKnownBugs' ./internal/sim
