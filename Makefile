# Every target, with its one line of help, is listed by `make`.
SHELL := /bin/bash
BIN   := $(CURDIR)/bin

# Without gRPC's client for service meshes, which Google's storage library would use
# for a way of access that backups do not take: a fifth of the binary, and 12 MB of
# what is resident of every node.
export GOFLAGS := $(strip $(GOFLAGS) -tags=disable_grpc_modules)

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

.PHONY: build
build: ## build bin/router
	go build -trimpath -o $(BIN)/router ./cmd/router

.PHONY: run
run: build ## start a three-node cluster on this machine, with demo sidecars
	$(BIN)/router dev

.PHONY: tools
tools: $(BIN)/.tools ## build the pinned tools of tools/go.mod into bin/

$(BIN)/.tools: tools/go.mod tools/go.sum
	cd tools && go build -o $(BIN)/ tool
	@touch $@

.PHONY: gen
gen: tools ## regenerate the protobuf code
	cd proto && $(BIN)/buf generate
	cd proto && $(BIN)/buf generate --template buf.gen.hot.yaml \
		--path conveyor --path conveyor_etl/checkpoint.proto --path conveyor_etl/cluster.proto \
		--path conveyor_etl/sidecar.proto

.PHONY: test
test: ## run all tests that fit into a few minutes
	go test -timeout 10m $$(go list ./... | grep -v '/e2e$$')
	@# It builds the binary itself, of which go test's cache knows nothing.
	go test -timeout 10m -count=1 ./e2e

.PHONY: race
race: ## the same under the race detector
	go test -race -timeout 30m ./...

.PHONY: lint
lint: tools ## gofmt, go vet, staticcheck and the rules of this repository
	@out=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); \
		if [ -n "$$out" ]; then echo "gofmt -w is needed for:"; echo "$$out"; exit 1; fi
	go vet ./...
	$(BIN)/staticcheck ./...
	go test ./internal/lint

# Each fuzz target of each package for FUZZTIME; go test takes one at a time.
FUZZTIME ?= 10s
.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME (10s)
	@set -euo pipefail; \
	git ls-files -co --exclude-standard '*_test.go' | xargs grep -oH '^func Fuzz[A-Za-z0-9_]*' | \
	while IFS=: read -r file func; do \
		name=$${func#func }; dir=./$$(dirname $$file); \
		echo "$$dir $$name"; \
		go test $$dir -run '^$$' -fuzz "^$$name$$" -fuzztime $(FUZZTIME) </dev/null; \
	done

# A random start unless SEED names one; SEED alone runs that seed and prints
# every event.
SEEDS ?= 20000
.PHONY: sim
sim: ## simulate SEEDS (20000) whole groups with faults, or replay SEED=
ifdef SEED
	go test ./raftnode -run 'TestSimulation$$' -timeout 0 -v -seed=$(SEED) $(if $(filter command% environment%,$(origin SEEDS)),-seeds=$(SEEDS),-events)
else
	go test ./raftnode -run 'TestSimulation$$' -timeout 0 -v -seed=$$(date +%s%N) -seeds=$(SEEDS)
endif

# RUN=TestFleetUnderFaults picks the tests; a failed one prints its seed.
FAULTS_FOR ?= 10m
RUN ?= .
.PHONY: e2e
e2e: ## real processes, kills and partitions for FAULTS_FOR (10m) each; RUN= picks tests
	go test ./e2e -run '$(RUN)' -count=1 -timeout 0 -v -faults-for=$(FAULTS_FOR)

.PHONY: rewrite-golden
rewrite-golden: ## write the golden files of manifest and wal anew; look at the diff
	go test ./manifest ./wal -rewrite

# Rows by name and comma, all when empty; see bench/etcd/README.md.
ROWS ?=
PAIRS ?= 3
DURATION ?= 6s
.PHONY: bench
bench: build ## compare with etcd 3.7.3 on this machine; ROWS=unary64,outage picks rows
	cd bench/etcd/build && go build -trimpath -o $(BIN)/etcd go.etcd.io/etcd/server/v3
	cd bench/etcd && go build -trimpath -o $(BIN)/bench-etcd .
	$(BIN)/bench-etcd -router $(BIN)/router -etcd $(BIN)/etcd \
		-rows '$(ROWS)' -pairs $(PAIRS) -duration $(DURATION)

# Values of the objects: text (random hex digits), random or repeat.
OBJECTS ?= 1000000
CONTENT ?= text
SYSTEMS ?= etcd,router
.PHONY: bench-recovery
bench-recovery: build ## figures of backup, restore and catch-up, beside etcd's; ROWS=snapshot,restore picks rows
	cd bench/etcd/build && go build -trimpath -o $(BIN)/etcd go.etcd.io/etcd/server/v3 && \
		go build -trimpath -o $(BIN)/etcdutl go.etcd.io/etcd/etcdutl/v3
	cd bench/etcd && go build -trimpath -o $(BIN)/bench-etcd .
	$(BIN)/bench-etcd -router $(BIN)/router -etcd $(BIN)/etcd -etcdutl $(BIN)/etcdutl -out data/bench-recovery \
		-rows '$(or $(ROWS),recovery)' -systems $(SYSTEMS) -objects $(OBJECTS) -content $(CONTENT)

# The set that fits two cores: three nodes and the fleet share the machine.
FLEET ?= --sidecars 10000 --watchers 10000 --pipelines 1000 --beats stream --duration 30s --scenarios steady,one,mass,storm,leader
.PHONY: bench-fleet
bench-fleet: build ## figures of a simulated fleet on three nodes; FLEET= takes other flags
	$(BIN)/router bench fleet --nodes 3 $(FLEET)

.PHONY: bench-locality
bench-locality: ## local edges at full size, against 100 randomised greedy runs; some minutes
	go test ./placement -run '^$$' -bench Locality -benchtime 1x -timeout 1h -v

.PHONY: profile
profile: build ## renew cmd/router/default.pgo, by which the compiler optimises
	bench/profile.sh

.PHONY: ci
ci: ## what a change has to pass
	.ci/run

.PHONY: clean
clean: ## remove what was built; data/ stays
	rm -rf bin
