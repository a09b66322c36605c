# Keyward. `make` builds and checks; `make demo` shows the whole thing on a
# fresh Debian 12; `make test` installs what the tests need and runs them all.

GO      ?= go
BIN     := bin
LDFLAGS := -s -w
# gRPC's request tracing links HTML templates and with them every exported
# method: 3 MB of the agent's memory for a page that nobody serves.
TAGS    := grpcnotrace
# What the tests and the demo need of Debian. Everything else is Go.
PACKAGES := softhsm2 mariadb-server mariadb-backup libmariadbd-dev libssl-dev gcc make pkg-config \
            libnss3 libnss3-tools protobuf-compiler strace valgrind sysbench procps
SUDO    := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)

.PHONY: all build go plugin vet lint arch test race fuzz bench demo campaign deps generate generated clean

all: build vet lint test

build: go plugin

# The agent and the CLI are static and free of cgo; the KMS needs cgo for PKCS#11.
go:
	CGO_ENABLED=1 $(GO) build -trimpath -tags $(TAGS) -ldflags '$(LDFLAGS)' -o $(BIN)/keyward-kms ./cmd/keyward-kms
	CGO_ENABLED=0 $(GO) build -trimpath -tags $(TAGS) -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/keyward ./cmd/keyward-agent

plugin:
	$(MAKE) -C plugins/mariadb

vet:
	$(GO) vet ./...

lint: arch
	@test -z "$$(gofmt -l $$(git ls-files '*.go' | grep -v '\.pb\.go$$'))" || { gofmt -l $$(git ls-files '*.go'); echo 'run gofmt'; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

# The import rules of the house, always measured afresh.
arch:
	$(GO) test -count=1 ./cmd/internal/archtest

# TESTFLAGS=-race is what CI adds.
TESTFLAGS ?=
test: deps build
	$(GO) test $(TESTFLAGS) -timeout 30m ./...

race:
	$(MAKE) test TESTFLAGS=-race

# Every fuzz target of FUZZPKGS for FUZZTIME each (10s, or 10000x: a number of
# runs, which can not end in a late deadline as a time can). CI takes the formats that a
# customer's data hangs on; their seeds run everywhere as ordinary tests.
FUZZTIME ?= 10s
FUZZPKGS ?= ./...
fuzz:
	@set -e; for pkg in $$($(GO) list $(FUZZPKGS)); do \
	  for f in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "fuzz $$pkg $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$pkg; done; done

bench: deps build
	$(GO) run ./benchmarks $(BENCH)

# KEEP=1 leaves everything running and prints how to look around.
demo: deps build
	$(GO) run ./cmd/internal/demo $(if $(KEEP),-keep)

# kill -9 of the key service during create and roll, ROUNDS times; prints the
# seed, so that a failure can be repeated with SEED=.
ROUNDS ?= 300
campaign: deps build
	KEYWARD_CAMPAIGN_ROUNDS=$(ROUNDS) KEYWARD_CAMPAIGN_SEED=$(SEED) KEYWARD_REQUIRE_INTEGRATION=1 \
	  $(GO) test -count=1 -timeout 0 -run TestCampaign -v ./cmd/keyward-kms

# Installs only what is missing, so that it is quick and quiet the second time.
deps:
	@command -v $(GO) >/dev/null || { echo 'Go 1.26 or newer is needed: https://go.dev/dl'; exit 1; }
	@missing=''; for p in $(PACKAGES); do \
	  dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then echo "installing:$$missing"; \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get update -q >/dev/null && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; fi

# Needs protobuf-compiler; the result is committed and CI checks nothing changed.
generate:
	GOBIN=$(CURDIR)/$(BIN) $(GO) install google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	PATH=$$PATH:$(CURDIR)/$(BIN) protoc -I kms/kmspb --go_out=kms/kmspb --go_opt=paths=source_relative \
	  --go-grpc_out=kms/kmspb --go-grpc_opt=paths=source_relative kms/kmspb/kms.proto

# The generated code is that of the description.
generated: generate
	git diff --exit-code -- kms/kmspb

clean:
	rm -rf $(BIN) benchmarks/out
	$(MAKE) -C plugins/mariadb clean
