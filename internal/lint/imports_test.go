package lint

import (
	"fmt"
	"path"
	"strconv"
	"strings"
	"testing"
)

// importRule forbids imports to a package. Packages of this module are written
// relative to it with a leading "./"; a pattern that ends in "/..." also
// covers everything below.
type importRule struct {
	// from is the package, or the tree of packages, that the rule binds.
	from string
	// forbidden are the imports it must not have, except those in except.
	forbidden []string
	except    []string
	// tests: the rule binds the tests of the package too.
	tests bool
	// reason is printed with a violation.
	reason string
}

const (
	pebblePkg = "github.com/cockroachdb/pebble/..."
	vfsPkg    = "github.com/cockroachdb/pebble/v2/vfs/..."
	grpcPkg   = "google.golang.org/grpc/..."
)

// importRules is the direction of dependencies; see ARCHITECTURE.md.
var importRules = []importRule{{
	from:      "./...",
	forbidden: []string{"./cmd/...", "./e2e/...", "./internal/lint"},
	tests:     true,
	reason:    "commands and tests sit on top of everything; what they share with others belongs into a package below",
}, {
	from:      "./wal",
	forbidden: []string{"./...", pebblePkg, grpcPkg},
	reason:    "the log must be testable and repairable on its own, and knows neither the group nor the commands in it",
}, {
	from:      "./snap",
	forbidden: []string{"./...", grpcPkg},
	except:    []string{"./internal/background"},
	tests:     true,
	reason:    "images are bytes with checksums; what they mean and how they travel is for others to know",
}, {
	from:      "./internal/background",
	forbidden: []string{"./..."},
	tests:     true,
	reason:    "what has work done knows nothing of the work, so that any package may use it",
}, {
	from:      "./snap",
	forbidden: []string{pebblePkg},
	except:    []string{vfsPkg},
	reason:    "images are made and opened by the state machine; only the file system abstraction is shared",
}, {
	from:      "./backup/...",
	forbidden: []string{"./...", grpcPkg},
	except:    []string{"./snap", "./backup/..."},
	tests:     true,
	reason:    "a backup is an image and a description; who makes, sends and restores it depends on it, never the other way round",
}, {
	from:      "./backup/archive",
	forbidden: []string{"./backup/...", pebblePkg, "gocloud.dev/..."},
	except:    []string{vfsPkg, "./backup/archive"},
	reason:    "the format of backups is read by every node; the places they are kept in, and what these pull in, are no concern of it",
}, {
	from:      "./backup",
	forbidden: []string{"./backup/..."},
	reason:    "a store keeps bytes; it neither knows the format of an archive nor pulls in the drivers of object stores",
}, {
	from:      "./server",
	forbidden: []string{"./backup/stores"},
	reason:    "the drivers of object stores are heavy; the command pulls them in, and whoever embeds a node need not",
}, {
	from:      "./raftnode",
	forbidden: []string{"./...", grpcPkg},
	except:    []string{"./wal", "./snap"},
	tests:     true,
	reason:    "raftnode turns bytes into applied results; the simulator can only run it while it knows neither commands nor network",
}, {
	from:      "./raftnode",
	forbidden: []string{pebblePkg},
	reason:    "the state machine owns its storage; raftnode sees it through the StateMachine interface only",
}, {
	from:      "./router",
	forbidden: []string{"./...", grpcPkg},
	except:    []string{"./router/commandpb", "./internal/pace"},
	tests:     true,
	reason:    "the state is a pure function of the log; whoever calls it depends on it, never the other way round (and API types must not get into the log)",
}, {
	from: "./router",
	forbidden: []string{"math/rand/...", "crypto/rand", "os/...", "net/...", "syscall",
		"github.com/google/uuid", "golang.org/x/sys/..."},
	reason: "replicas would diverge: randomness, environment and network are stamped into the command by the proposer, files go through vfs",
}, {
	from:      "./router/commandpb",
	forbidden: []string{"./..."},
	tests:     true,
	reason:    "the log format is replicated for ever; it must not change because the API does",
}, {
	from:      "./internal/freeing",
	forbidden: []string{"./...", pebblePkg},
	except:    []string{vfsPkg},
	reason:    "how a file is removed does not depend on what it is",
}, {
	from:      "./internal/pace",
	forbidden: []string{"./...", pebblePkg},
	except:    []string{vfsPkg},
	reason:    "when work rests is decided by who knows what it is for",
}, {
	from:      "./rpc",
	forbidden: []string{"./...", pebblePkg, "go.etcd.io/etcd/..."},
	except: []string{"./raftnode", "./router", "./router/commandpb", "./snap", "./rpc/peerpb", "./rpc/routerpb/...",
		"./recovery", "./backup/archive", "./backup/shelf", "./placement", "./internal/background"},
	reason: "the edge translates; it never touches a disk and decides nothing",
}, {
	from:      "./rpc/client",
	forbidden: []string{"./...", pebblePkg, "go.etcd.io/..."},
	except:    []string{"./rpc/routerpb/..."},
	reason:    "users import the client; it must not pull a server into their program",
}, {
	from:      "./rpc/peerpb",
	forbidden: []string{"./..."},
	reason:    "the peer protocol is versioned by itself",
}, {
	from:      "./rpc/routerpb/...",
	forbidden: []string{"./..."},
	except:    []string{"./rpc/routerpb/..."},
	reason:    "users import the API types; they must not pull anything else of ours along",
}, {
	from:      "./control",
	forbidden: []string{"./...", pebblePkg, grpcPkg},
	except:    []string{"./raftnode", "./router", "./router/commandpb", "./placement"},
	reason:    "the leader's loops propose commands like any other caller; they reach neither disk nor network",
}, {
	from:      "./placement",
	forbidden: []string{"./...", pebblePkg, grpcPkg, "go.etcd.io/..."},
	tests:     true,
	reason:    "a plan is a pure function of what it is given: it can be checked and timed at full size only while it knows neither state nor commands",
}, {
	from:      "./placement",
	forbidden: []string{"time", "math/rand/...", "crypto/rand", "os/...", "net/...", "sync/...", "context"},
	reason:    "equal views must give equal plans: no clock, no randomness, no environment, no scheduling",
}, {
	from:      "./recovery",
	forbidden: []string{"./...", pebblePkg, grpcPkg},
	except:    []string{"./raftnode", "./router", "./router/commandpb", "./snap", "./backup", "./backup/archive", "./backup/shelf", vfsPkg},
	reason:    "restores are carried out through commands, by any caller; how a client asks for one is the edge's business",
}, {
	from:      "./backup/...",
	forbidden: []string{"./...", pebblePkg, grpcPkg, "go.etcd.io/etcd/..."},
	except:    []string{"./snap", "./backup/...", vfsPkg},
	reason:    "an archive is an image with a cover, and a place is where it lies; neither knows the state or the cluster",
}, {
	from:      "./config",
	forbidden: []string{"./...", pebblePkg, grpcPkg},
	reason:    "settings are read before anything exists that they could configure",
}, {
	from:      "./datadir",
	forbidden: []string{"./...", pebblePkg, grpcPkg, "go.etcd.io/..."},
	tests:     true,
	reason:    "nodes and tools must agree on a data directory before they know anything that is in it",
}, {
	from:      "./offline",
	forbidden: []string{"./...", grpcPkg, "go.etcd.io/etcd/..."},
	except: []string{"./datadir", "./wal", "./snap", "./raftnode", "./router", "./router/commandpb", "./rpc",
		"./backup", "./backup/archive"},
	reason: "tools work on the files of a node that does not run, by the rules of the packages that own them; they are no part of a node",
}, {
	from:      "./offline",
	forbidden: []string{pebblePkg},
	except:    []string{vfsPkg},
	reason:    "the state machine owns its storage; a tool that read it itself would miss a change of the layout",
}, {
	from:      "./output",
	forbidden: []string{"./..."},
	reason:    "printing tables needs no knowledge of what is in them",
}, {
	from:      "./manifest",
	forbidden: []string{"./..."},
	except:    []string{"./output", "./rpc/routerpb/..."},
	reason:    "a manifest is turned into API messages and nothing else",
}, {
	from:      "./e2e",
	forbidden: []string{"./...", pebblePkg, "go.etcd.io/..."},
	except:    []string{"./rpc/client", "./rpc/routerpb/...", "./e2e/...", "./internal/freeport"},
	tests:     true,
	reason:    "end-to-end tests see what users see: the binary and the API; knowing the insides, they would prove less",
}}

// matches reports whether the import or package p, in rule notation, is covered
// by pattern.
func matches(pattern, p string) bool {
	if tree, ok := strings.CutSuffix(pattern, "/..."); ok {
		return p == tree || strings.HasPrefix(p, tree+"/")
	}
	return p == pattern
}

func matchesAny(patterns []string, p string) bool {
	for _, pattern := range patterns {
		if matches(pattern, p) {
			return true
		}
	}
	return false
}

// relative returns an import path in rule notation.
func relative(importPath string) string {
	if importPath == modulePath {
		return "."
	}
	if rest, ok := strings.CutPrefix(importPath, modulePath+"/"); ok {
		return "./" + rest
	}
	return importPath
}

// checkImports reports the imports of f that rules forbid.
func checkImports(f *file, rules []importRule) (faults []string) {
	pkg := "./" + path.Dir(f.path)
	for _, spec := range f.syntax.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			faults = append(faults, f.at(spec, err.Error()))
			continue
		}
		target := relative(imported)
		if target == pkg && f.test {
			continue // a test in a package of its own tests what is beside it
		}
		for _, r := range rules {
			if f.test && !r.tests || !matches(r.from, pkg) || matchesAny(r.except, target) {
				continue
			}
			if matchesAny(r.forbidden, target) {
				faults = append(faults, f.at(spec, fmt.Sprintf("%s must not import %s: %s", pkg, target, r.reason)))
			}
		}
	}
	return faults
}

func TestImports(t *testing.T) {
	report(t, func(f *file) []string { return checkImports(f, importRules) })
}
