package atoll_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// sources lists the Go files under version control or about to be.
func sources(t *testing.T) []string {
	t.Helper()
	out, err := exec.Command("git", "ls-files", "-co", "--exclude-standard", "*.go").Output()
	if err != nil {
		t.Skipf("not a git checkout: %v", err)
	}
	return strings.Fields(string(out))
}

// Every exported name has a doc comment, and product code starts no timer-driven
// waits, uses no init and no default logger.
func TestTidySource(t *testing.T) {
	for _, path := range sources(t) {
		if strings.Contains(path, "atollv1/") {
			continue // generated
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
		if err != nil {
			if !os.IsNotExist(err) {
				t.Error(err)
			}
			continue
		}
		test := strings.HasSuffix(path, "_test.go") || strings.Contains(path, "test/")
		for _, d := range file.Decls {
			checkDecl(t, fset, d, test)
		}
		if test {
			continue
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok {
				if x, ok := sel.X.(*ast.Ident); ok && (x.Name+"."+sel.Sel.Name == "time.Sleep" || x.Name+"."+sel.Sel.Name == "slog.Default") {
					t.Errorf("%s: %s.%s in product code", fset.Position(n.Pos()), x.Name, sel.Sel.Name)
				}
			}
			return true
		})
	}
}

// checkDecl looks at one top-level declaration.
func checkDecl(t *testing.T, fset *token.FileSet, d ast.Decl, test bool) {
	switch d := d.(type) {
	case *ast.FuncDecl:
		if d.Name.Name == "init" && d.Recv == nil && !test {
			t.Errorf("%s: init function", fset.Position(d.Pos()))
		}
		if d.Name.IsExported() && d.Doc == nil && !test && exportedReceiver(d) {
			t.Errorf("%s: %s has no doc comment", fset.Position(d.Pos()), d.Name.Name)
		}
	case *ast.GenDecl:
		for _, s := range d.Specs {
			if ts, ok := s.(*ast.TypeSpec); ok && ts.Name.IsExported() && d.Doc == nil && ts.Doc == nil && !test {
				t.Errorf("%s: type %s has no doc comment", fset.Position(ts.Pos()), ts.Name.Name)
			}
		}
	}
}

// exportedReceiver reports whether a function, or the type it belongs to, is
// visible outside its package.
func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	e := d.Recv.List[0].Type
	if star, ok := e.(*ast.StarExpr); ok {
		e = star.X
	}
	if ix, ok := e.(*ast.IndexExpr); ok {
		e = ix.X
	}
	id, ok := e.(*ast.Ident)
	return ok && id.IsExported()
}
