# Every target, with its one line of help, is listed by `make`.
SHELL := /bin/bash
BIN   := $(CURDIR)/bin

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
		--path conveyor --path conveyor_etl/checkpoint.proto --path conveyor_etl/cluster.proto
