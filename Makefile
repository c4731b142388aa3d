# Everything a developer needs. "make demo" and "make test" work on a fresh
# Debian machine with Go.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
export CGO_ENABLED ?= 0

.PHONY: build demo test race chaos suites lint bench generate packages clean

build:            ## the static binary, bin/atoll
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/atoll ./cmd/atoll

demo: build       ## the main job end to end on real data; needs no root
	bin/atoll demo --script tour --rm

packages:         ## Debian packages that the tests use (needs root)
	@bash scripts/packages.sh

test: packages build ## every test
	@bash scripts/test.sh

race:             ## the unit tests under the race detector
	CGO_ENABLED=1 ATOLL_SIM_SEEDS=20 $(GO) test -race -short -timeout 30m ./...

# CHAOS_SEED=… draws the same faults again; CHAOS_FAULT="kill the owner" begins
# every round with that one; CHAOS_DISK=/mnt/x puts the data there and not on
# tmpfs; CHAOS_LOGS=/tmp/x keeps the servers' logs there, of CHAOS_LOG_LEVEL.
CHAOS_TIME ?= 1h
chaos: packages   ## break a cluster in network namespaces for CHAOS_TIME (needs root)
	CHAOS_TIME=$(CHAOS_TIME) $(GO) test -count=1 -timeout 0 -v -run TestLong ./e2e/chaos

lint:             ## gofmt, go vet, staticcheck
	@out=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$out" ]; then echo "gofmt would change:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

bench: build      ## speed and memory, with the bare disk in the same run
	$(GO) run ./bench

generate:         ## the API's code (needs protobuf-compiler and libprotobuf-dev)
	$(GO) build -o bin/ google.golang.org/protobuf/cmd/protoc-gen-go connectrpc.com/connect/cmd/protoc-gen-connect-go
	PATH="$(CURDIR)/bin:$$PATH" protoc -I internal/api -I /usr/include \
	  --go_out=. --go_opt=module=github.com/atollstore/atoll \
	  --connect-go_out=. --connect-go_opt=module=github.com/atollstore/atoll internal/api/atoll.proto

clean:
	rm -rf bin atoll-demo
