package lint

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const modulePath = "conveyor.etl/router"

// file is one parsed source file.
type file struct {
	// path is relative to the root of the repository, with forward slashes.
	path string
	// test: a _test.go file.
	test bool
	// generated: by a tool, so that only the rules about imports bind it.
	generated bool
	source    []byte
	fset      *token.FileSet
	syntax    *ast.File
}

// production reports whether f becomes part of what users run.
func (f *file) production() bool {
	return !f.test && !matchesAny([]string{"e2e/...", "internal/lint/..."}, path.Dir(f.path))
}

// at formats a fault at n.
func (f *file) at(n ast.Node, text string) string {
	return fmt.Sprintf("%s:%d: %s", f.path, f.fset.Position(n.Pos()).Line, text)
}

func parseFile(name string, source []byte) (*file, error) {
	fset := token.NewFileSet()
	syntax, err := parser.ParseFile(fset, name, source, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	return &file{
		path:      name,
		test:      strings.HasSuffix(name, "_test.go"),
		generated: ast.IsGenerated(syntax),
		source:    source,
		fset:      fset,
		syntax:    syntax,
	}, nil
}

// parseTree parses every Go file of the repository once. Directories with a
// go.mod of their own, testdata and hidden directories are not part of it.
var parseTree = sync.OnceValues(func() ([]*file, error) {
	root := filepath.Join("..", "..")
	var files []*file
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if rel == "." {
				return nil
			}
			if strings.HasPrefix(d.Name(), ".") || slices.Contains([]string{"testdata", "vendor", "bin", "data"}, d.Name()) {
				return fs.SkipDir
			}
			if _, err := os.Stat(filepath.Join(p, "go.mod")); err == nil {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		source, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		f, err := parseFile(filepath.ToSlash(rel), source)
		if err != nil {
			return err
		}
		files = append(files, f)
		return nil
	})
	return files, err
})

// tree returns the files of the repository.
func tree(t *testing.T) []*file {
	t.Helper()
	files, err := parseTree()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(files, func(f *file) bool { return f.path == "internal/lint/tree_test.go" }) {
		t.Fatalf("%d files found, this one is not among them: the walk starts in the wrong place", len(files))
	}
	return files
}

// report runs check on every file and fails with all faults.
func report(t *testing.T, check func(f *file) []string) {
	t.Helper()
	for _, f := range tree(t) {
		for _, fault := range check(f) {
			t.Error(fault)
		}
	}
}
