package transfer_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/atollstore/atoll/internal/rbdstream"
	"github.com/atollstore/atoll/internal/transfer"
	"github.com/atollstore/atoll/internal/transfer/transfertest"
)

// unpack reads a stream in testdata, made by the real rbd.
func unpack(t *testing.T, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	must(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	must(t, err)
	p, err := io.ReadAll(z)
	must(t, err)
	return p
}

// What the real rbd wrote once is read right for ever: an image of four
// snapshots, striped, of an odd size, with resizes and discards, as an image
// stream and as diffs. What we write of it never changes either.
func TestGoldenStreams(t *testing.T) {
	var g struct {
		Versions []struct {
			Name, SHA256 string
			Size         int64
			Protected    bool
		}
		Diffs  []string
		Merged string
	}
	b, err := os.ReadFile("testdata/rbd.json")
	must(t, err)
	must(t, json.Unmarshal(b, &g))
	check := func(m *transfertest.Image, what string) {
		t.Helper()
		versions, err := m.Versions(t.Context())
		must(t, err)
		if len(versions) != len(g.Versions)-1 {
			t.Fatalf("%s: versions %v", what, versions)
		}
		for i, want := range g.Versions {
			p, err := m.Bytes(want.Name)
			must(t, err)
			sum := sha256.Sum256(p)
			if int64(len(p)) != want.Size || hex.EncodeToString(sum[:]) != want.SHA256 {
				t.Errorf("%s: version %q differs", what, want.Name)
			}
			if what == "image" && i < len(versions) && versions[i].Protected != want.Protected {
				t.Errorf("%s: version %q: protected %v", what, want.Name, versions[i].Protected)
			}
		}
	}
	m := importImage(t, unpack(t, "rbd.image.gz"))
	check(m, "image")
	h, err := m.Header(t.Context())
	must(t, err)
	if h.Order != 20 || h.StripeUnit != 65536 || h.StripeCount != 4 || len(h.Meta) != 2 || h.Meta[1] != (rbdstream.Meta{Key: "mykey", Value: "my value"}) {
		t.Errorf("header %+v", h)
	}
	target := transfertest.New(0)
	for _, name := range g.Diffs {
		if _, err := transfer.ImportDiff(t.Context(), target, bytes.NewReader(unpack(t, name)), transfer.ImportOptions{}); err != nil {
			t.Fatal(name, err)
		}
	}
	check(target, "diffs")
	target = transfertest.New(0)
	for _, name := range append([]string{g.Merged}, g.Diffs[2:]...) {
		if _, err := transfer.ImportDiff(t.Context(), target, bytes.NewReader(unpack(t, name)), transfer.ImportOptions{}); err != nil {
			t.Fatal(name, err)
		}
	}
	if p, err := target.Bytes(""); err != nil {
		t.Error(err)
	} else if sum := sha256.Sum256(p); hex.EncodeToString(sum[:]) != g.Versions[len(g.Versions)-1].SHA256 {
		t.Error("the merged diff does something else")
	}
	var merged bytes.Buffer
	must(t, rbdstream.Merge(&merged, bytes.NewReader(unpack(t, g.Diffs[0])), bytes.NewReader(unpack(t, g.Diffs[1]))))
	if !bytes.Equal(merged.Bytes(), unpack(t, g.Merged)) {
		t.Error("our merged diff has other bytes than rbd's")
	}
	for name, p := range map[string][]byte{
		"image":  exportImage(t, m, transfer.ExportOptions{}),
		"summed": exportImage(t, m, transfer.ExportOptions{Checksum: true}),
		"diff":   exportDiff(t, m, transfer.Diff{From: "s1", To: "s3"}),
	} {
		sum := sha256.Sum256(p)
		if got := hex.EncodeToString(sum[:8]); got != ours[name] {
			t.Errorf("our %s has sum %q, want %q", name, got, ours[name])
		}
	}
}

// ours is the beginning of the SHA-256 of what we write of the golden image.
var ours = map[string]string{
	"image":  "30869d73cee22556",
	"summed": "c0c74a07a080ffce",
	"diff":   "0305cf6abd04aa2d",
}
