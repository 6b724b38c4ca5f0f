package rpc

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

var packageName = regexp.MustCompile(`\b(archive|backup|client|raftnode|recovery|router|rpc|shelf|snap|wal): `)

// Goal: no error of the table tells a caller which package made it.
func TestStatusTextsNameNoPackage(t *testing.T) {
	for _, row := range statusTable() {
		if text := Status(row.is).Message(); text == "" || packageName.MatchString(text) {
			t.Errorf("%s: %q", row.reason, text)
		}
	}
}

// Goal: whatever package of this module puts its name before its errors, Plain
// takes it off. Method: the sources are searched for such errors.
func TestPlainKnowsAllPackages(t *testing.T) {
	const root = ".."
	seen := 0
	packages := map[string]bool{}
	var literals []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != root && (strings.HasPrefix(name, ".") || name == "testdata" || name == "internal" || name == "bench" || name == "e2e" || name == "tools") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		packages[file.Name.Name] = true
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) == 0 {
				return true
			}
			fun, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || fun.Sel.Name != "New" && fun.Sel.Name != "Errorf" {
				return true
			}
			if lit, ok := call.Args[0].(*ast.BasicLit); ok && lit.Kind == token.STRING {
				if text, err := strconv.Unquote(lit.Value); err == nil {
					literals = append(literals, text)
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range literals {
		name, _, ok := strings.Cut(text, ": ")
		if !ok || !packages[name] {
			continue
		}
		seen++
		if plain := Plain("restore of x: " + text); strings.Contains(plain, name+": ") {
			t.Errorf("%q is not made plain: %q", text, plain)
		}
	}
	if seen < 200 {
		t.Errorf("only %d errors found", seen)
	}
}

func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"shelf: no such snapshot: x":                         "no such snapshot: x",
		"rpc: a: raftnode: b; router: c (snap: d)":           "a: b; c (d)",
		"recovery: router: corrupt":                          "corrupt",
		"rpc error: code = NotFound desc = rpc: no":          "no",
		"x: rpc error: code = Unavailable desc = y":          "x: y",
		"pipeline router: has no stages":                     "pipeline router: has no stages",
		"the snapshot: it is gone":                           "the snapshot: it is gone",
		"open /srv/wal: permission denied":                   "open /srv/wal: permission denied",
		"nothing was done (last: wal: a segment is missing)": "nothing was done (last: a segment is missing)",
	} {
		if got := Plain(in); got != want {
			t.Errorf("Plain(%q) = %q, want %q", in, got, want)
		}
	}
}
