package lint

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/format"
	"go/token"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	// maxLines is where a file has more than one job. Generated files and
	// tests are not counted.
	maxLines = 700
)

// importName returns the name under which f uses the package importPath, or "".
func (f *file) importName(importPath string) string {
	for _, spec := range f.syntax.Imports {
		if p, err := strconv.Unquote(spec.Path.Value); err != nil || p != importPath {
			continue
		}
		if spec.Name != nil {
			return spec.Name.Name
		}
		return path.Base(importPath)
	}
	return ""
}

// uses reports every use in f of one of the names of package importPath.
func (f *file) uses(importPath string, names []string, reason string) (faults []string) {
	pkg := f.importName(importPath)
	if pkg == "" {
		return nil
	}
	ast.Inspect(f.syntax, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if x, ok := sel.X.(*ast.Ident); ok && x.Name == pkg && slices.Contains(names, sel.Sel.Name) {
			faults = append(faults, f.at(sel, fmt.Sprintf("%s.%s: %s", pkg, sel.Sel.Name, reason)))
		}
		return true
	})
	return faults
}

func checkFormat(f *file) []string {
	if f.generated {
		return nil
	}
	want, err := format.Source(f.source)
	if err != nil {
		return []string{fmt.Sprintf("%s: %v", f.path, err)}
	}
	if !bytes.Equal(f.source, want) {
		return []string{f.path + ": not formatted: run gofmt -w " + f.path}
	}
	return nil
}

func checkSleep(f *file) []string {
	if f.production() {
		return nil
	}
	return f.uses("time", []string{"Sleep"},
		"tests wait for a condition or a channel, or use testing/synctest; a sleep is too short on a busy machine and too long on any other")
}

func checkClock(f *file) []string {
	if f.test || !matches("router/...", path.Dir(f.path)) {
		return nil
	}
	return f.uses("time", []string{"Now", "Since", "Until", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker", "Sleep", "Local"},
		"replicas would diverge: time is stamped into the command by the proposer")
}

func checkInit(f *file) (faults []string) {
	if f.generated {
		return nil
	}
	for _, d := range f.syntax.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
			faults = append(faults, f.at(fn, "init functions hide order and state: call what is needed from where it is needed"))
		}
	}
	return faults
}

func checkLength(f *file) []string {
	if f.generated || !f.production() {
		return nil
	}
	if n := bytes.Count(f.source, []byte("\n")); n > maxLines {
		return []string{fmt.Sprintf("%s: %d lines, the limit is %d: split it by what it does", f.path, n, maxLines)}
	}
	return nil
}

var sentinelName = regexp.MustCompile(`^Err[A-Z]`)

// isSentinel reports whether x names an error variable: ErrX or pkg.ErrX.
func isSentinel(x ast.Expr) bool {
	switch x := ast.Unparen(x).(type) {
	case *ast.Ident:
		return sentinelName.MatchString(x.Name)
	case *ast.SelectorExpr:
		_, ok := x.X.(*ast.Ident)
		return ok && sentinelName.MatchString(x.Sel.Name)
	}
	return false
}

func checkErrorComparison(f *file) (faults []string) {
	if f.generated {
		return nil
	}
	const reason = "compare errors with errors.Is: a wrapped error is not equal to its sentinel"
	ast.Inspect(f.syntax, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			// An Is method is what errors.Is calls; it has to compare.
			if n.Recv != nil && n.Name.Name == "Is" {
				return false
			}
		case *ast.BinaryExpr:
			if (n.Op == token.EQL || n.Op == token.NEQ) && (isSentinel(n.X) || isSentinel(n.Y)) {
				faults = append(faults, f.at(n, reason))
			}
		case *ast.SwitchStmt:
			if n.Tag == nil {
				break
			}
			for _, c := range n.Body.List {
				if slices.ContainsFunc(c.(*ast.CaseClause).List, isSentinel) {
					faults = append(faults, f.at(c, reason))
				}
			}
		}
		return true
	})
	return faults
}

// checkDocs reports exported declarations without a doc comment, and functions
// and types whose comment does not start with their name.
func checkDocs(f *file) (faults []string) {
	if f.generated || !f.production() {
		return nil
	}
	want := func(n ast.Node, name string, doc *ast.CommentGroup) {
		text := strings.TrimSpace(doc.Text())
		switch {
		case text == "":
			faults = append(faults, f.at(n, fmt.Sprintf("exported %s has no doc comment", name)))
		case !regexp.MustCompile(`^((A|An|The) )?` + regexp.QuoteMeta(name) + `\b`).MatchString(text):
			faults = append(faults, f.at(n, fmt.Sprintf("the doc comment of %s does not start with its name", name)))
		}
	}
	for _, d := range f.syntax.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Name.IsExported() && (d.Recv == nil || ast.IsExported(receiver(d))) {
				want(d, d.Name.Name, d.Doc)
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch spec := spec.(type) {
				case *ast.TypeSpec:
					if spec.Name.IsExported() {
						doc := spec.Doc
						if doc == nil {
							doc = d.Doc
						}
						want(spec, spec.Name.Name, doc)
					}
				case *ast.ValueSpec:
					// One comment may speak for a block of constants.
					if d.Doc != nil || spec.Doc != nil || spec.Comment != nil {
						continue
					}
					for _, name := range spec.Names {
						if name.IsExported() {
							faults = append(faults, f.at(name, fmt.Sprintf("exported %s has no doc comment", name.Name)))
						}
					}
				}
			}
		}
	}
	return faults
}

// receiver returns the name of the type that d is a method of.
func receiver(d *ast.FuncDecl) string {
	x := d.Recv.List[0].Type
	for {
		switch t := x.(type) {
		case *ast.StarExpr:
			x = t.X
		case *ast.IndexExpr:
			x = t.X
		case *ast.IndexListExpr:
			x = t.X
		case *ast.Ident:
			return t.Name
		default:
			return ""
		}
	}
}

func TestFormat(t *testing.T)          { report(t, checkFormat) }
func TestNoSleepInTests(t *testing.T)  { report(t, checkSleep) }
func TestNoClockInRouter(t *testing.T) { report(t, checkClock) }
func TestNoInit(t *testing.T)          { report(t, checkInit) }
func TestFileLength(t *testing.T)      { report(t, checkLength) }
func TestErrorsAreComparedWithIs(t *testing.T) {
	report(t, checkErrorComparison)
}
func TestExportedNamesAreDocumented(t *testing.T) { report(t, checkDocs) }

// TestPackageDocs: every package says what it is, in one place.
func TestPackageDocs(t *testing.T) {
	documented := map[string][]string{}
	for _, f := range tree(t) {
		dir := path.Dir(f.path)
		if f.test || f.generated {
			continue
		}
		where := documented[dir]
		if f.syntax.Doc != nil {
			where = append(where, f.path)
		}
		documented[dir] = where
	}
	for dir, where := range documented {
		if len(where) != 1 {
			t.Errorf("%s: the package comment belongs into exactly one file, it is in %d %v", dir, len(where), where)
		}
	}
}
