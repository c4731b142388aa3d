package rbd_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

var golden = flag.Bool("golden", false, "write streams made by the installed rbd to internal/transfer/testdata, for machines without it")

// golden describes what the streams in testdata hold.
type goldenImage struct {
	Made     string
	Versions []goldenVersion // the last is the head
	Diffs    []string        // files: from the version before to each
	Merged   string          // file: the first two diffs
}

type goldenVersion struct {
	Name      string
	Size      int
	Protected bool
	SHA256    string
}

// TestGolden makes the streams by which the package transfer is tested where
// Ceph is not installed.
func TestGolden(t *testing.T) {
	if !*golden {
		t.Skip("only with -golden")
	}
	c := start(t)
	dir := "../../internal/transfer/testdata"
	must(t, os.MkdirAll(dir, 0o755))
	image := c.name()
	c.do(t, cmd{"op": "create", "image": image, "size": 12587000, "order": 20, "stripe_unit": 65536, "stripe_count": 4, "features": 63})
	c.do(t, cmd{"op": "meta", "image": image, "key": "mykey", "value": "my value"})
	c.do(t, cmd{"op": "meta", "image": image, "key": "conf_rbd_cache", "value": "false"})
	for _, op := range []cmd{
		{"op": "write", "off": 12500000, "n": 87000, "seed": 3},
		{"op": "write", "off": 100, "n": 600000, "seed": 4},
		{"op": "snap", "snap": "s1", "protect": true},
		{"op": "resize", "size": 9000001},
		{"op": "discard", "off": 40000, "n": 200000},
		{"op": "write", "off": 8999000, "n": 1001, "seed": 5},
		{"op": "snap", "snap": "s2"},
		{"op": "resize", "size": 16777216},
		{"op": "write", "off": 12345678, "n": 77777, "seed": 6},
		{"op": "snap", "snap": "s3"},
		{"op": "write", "off": 0, "n": 100, "seed": 7},
		{"op": "discard", "off": 8388608, "n": 4194304},
		{"op": "snap", "snap": "s4", "protect": true},
		{"op": "resize", "size": 5000001},
		{"op": "write", "off": 4096, "n": 4096, "seed": 8},
	} {
		op["image"] = image
		c.do(t, op)
	}
	var g goldenImage
	g.Made = string(bytes.TrimSpace(c.must(t, "rbd", "--version")))
	write := func(name string, p []byte) {
		var b bytes.Buffer
		z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
		must(t, err)
		_, err = z.Write(p)
		must(t, err)
		must(t, z.Close())
		must(t, os.WriteFile(filepath.Join(dir, name), b.Bytes(), 0o644))
		t.Logf("%s: %d bytes of %d", name, b.Len(), len(p))
	}
	write("rbd.image.gz", c.must(t, "rbd", "export", "--no-progress", "--export-format", "2", image, "-"))
	from := ""
	for i, s := range append(c.do(t, cmd{"op": "info", "image": image}).Snaps, [3]any{"", 0.0, false}) {
		v := goldenVersion{Name: s[0].(string), Protected: s[2].(bool)}
		p := c.read(t, image, v.Name)
		sum := sha256.Sum256(p)
		v.Size, v.SHA256 = len(p), hex.EncodeToString(sum[:])
		g.Versions = append(g.Versions, v)
		args, spec := []string{"export-diff", "--no-progress"}, image
		if from != "" {
			args = append(args, "--from-snap", from)
		}
		if v.Name != "" {
			spec += "@" + v.Name
		}
		file := fmt.Sprintf("rbd.diff%d.gz", i+1)
		d := c.must(t, "rbd", append(args, spec, "-")...)
		write(file, d)
		must(t, os.WriteFile(filepath.Join(c.dir, file), d, 0o600))
		g.Diffs = append(g.Diffs, file)
		from = v.Name
	}
	g.Merged = "rbd.merged.gz"
	write(g.Merged, c.must(t, "rbd", "merge-diff", "--no-progress", g.Diffs[0], g.Diffs[1], "-"))
	b, err := json.MarshalIndent(g, "", "\t")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "rbd.json"), append(b, '\n'), 0o644))
}
