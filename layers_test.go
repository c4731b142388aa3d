package atoll_test

import (
	"encoding/json"
	"io"
	"os/exec"
	"strings"
	"testing"
)

// layers gives every package its level; a package imports only lower ones. A
// new package does not pass until it has a line here.
var layers = map[string]int{
	"internal/atoll": 1,
	"python":         1, // the embedded module

	"internal/host": 2,
	"internal/pki":  2,
	"internal/qos":  2,

	"internal/rbdstream": 2,

	"internal/segment": 3,
	"internal/wire":    3,
	"internal/catalog": 3,

	"internal/node":   4,
	"internal/stream": 4,

	"internal/medium":     5,
	"internal/controller": 5,
	"internal/heal":       5,

	"internal/medium/pebblefs": 6,
	"internal/medium/volume":   6,

	"internal/gateway/nbd":                7,
	"internal/gateway/blockdev":           7,
	"internal/api":                        7,
	"internal/api/atollv1":                1, // generated
	"internal/api/atollv1/atollv1connect": 2,

	"internal/gateway/curve": 8,
	"internal/sim":           8,
	"internal/transfer":      8,
	".":                      8, // the client for Go
	"cbd":                    8,

	"internal/server": 9,

	"bench":        10,
	"internal/cli": 10,

	"internal/demo": 11,

	"cmd/atoll": 12,

	"e2e":       13, // tests only
	"e2e/chaos": 13,
	"e2e/curve": 13,
	"e2e/guest": 13,
	"e2e/rbd":   13,
}

// foreign says which package may import a large dependency: each foreign thing
// has one owner.
var foreign = map[string][]string{
	"go.etcd.io/etcd":               {"internal/catalog"},
	"github.com/cockroachdb/pebble": {"internal/medium/pebblefs"},
	"github.com/hanwen/go-fuse":     {"internal/gateway/blockdev"},
	"github.com/spf13/cobra":        {"internal/cli", "cmd/atoll"},
}

type goPackage struct {
	ImportPath string
	Imports    []string
	Doc        string
}

const module = "github.com/atollstore/atoll/"

// packages lists the packages of this module.
func packages(t *testing.T) []goPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,Doc", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := dec.Decode(&p); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestImportsPointDown(t *testing.T) {
	for _, p := range packages(t) {
		name := inModule(p.ImportPath)
		if strings.HasSuffix(name, "test") {
			continue // for tests of its parent
		}
		level, ok := layers[name]
		if !ok {
			t.Errorf("%s has no level in layers", name)
			continue
		}
		if p.Doc == "" && !strings.Contains(name, "atollv1") {
			t.Errorf("%s has no package comment", name)
		}
		for _, imp := range p.Imports {
			below := inModule(imp)
			ours := below != imp
			if ours && strings.HasSuffix(below, "test") {
				t.Errorf("%s imports %s, which is for tests", name, below)
			}
			if ours && layers[below] >= level && !strings.HasPrefix(below, name+"/") {
				t.Errorf("%s (level %d) imports %s (level %d)", name, level, below, layers[below])
			}
			for dep, owners := range foreign {
				if strings.HasPrefix(imp, dep) && !contains(owners, name) {
					t.Errorf("%s imports %s, which belongs to %v", name, imp, owners)
				}
			}
		}
	}
}

// inModule returns the path of a package within this module, "." for its root.
func inModule(path string) string {
	if path+"/" == module {
		return "."
	}
	return strings.TrimPrefix(path, module)
}

func contains(list []string, s string) bool {
	for _, e := range list {
		if e == s {
			return true
		}
	}
	return false
}
