package rbd_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/atollstore/atoll/internal/rbdstream"
	"github.com/atollstore/atoll/internal/transfer"
	"github.com/atollstore/atoll/internal/transfer/transfertest"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestStreams tests all streams in both directions against one cluster.
func TestStreams(t *testing.T) {
	c := start(t)
	for _, test := range []struct {
		name string
		run  func(t *testing.T, c *ceph)
	}{
		{"OursToTheirs", oursToTheirs},
		{"TheirsToOurs", theirsToOurs},
		{"Aligned", aligned},
		{"Clone", cloneToOurs},
		{"Striped", striped},
		{"Raw", raw},
		{"Merge", merge},
		{"Refusals", refusals},
		{"Large", large},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, c) })
	}
}

// history makes one of our images with versions s1 to sN and a head beyond, by a
// random history of writes, discards and resizes.
func history(t *testing.T, rng *rand.Rand, versions int) *transfertest.Image {
	t.Helper()
	size := 1 + rng.Int64N(20<<20)
	m := transfertest.New(size)
	h := rbdstream.DefaultHeader()
	h.Meta = []rbdstream.Meta{{Key: "conf_rbd_cache", Value: "false"}, {Key: "mykey", Value: "my value"}}
	m.SetHeader(h)
	for i := range versions + 1 {
		for range rng.IntN(6) {
			off := rng.Int64N(size)
			n := min(rng.Int64N(1<<(1+rng.IntN(23))), size-off)
			switch rng.IntN(8) {
			case 0:
				size = 1 + rng.Int64N(20<<20)
				must(t, m.Resize(size))
			case 1, 2:
				must(t, m.Discard(off, n))
			default:
				p := make([]byte, n)
				for at := 0; at < len(p); at += 4096 {
					if rng.IntN(4) > 0 {
						fill := p[at:min(at+4096, len(p))]
						copy(fill, bytes.Repeat([]byte{byte(rng.IntN(256)), 1}, len(fill)/2))
					}
				}
				must(t, m.Write(p, off))
			}
		}
		if i < versions {
			must(t, m.Snapshot(fmt.Sprintf("s%d", i+1), rng.IntN(3) == 0))
		}
	}
	return m
}

// names lists an image's versions and "" for its head.
func names(t *testing.T, m transfer.Image) []string {
	t.Helper()
	versions, err := m.Versions(t.Context())
	must(t, err)
	var all []string
	for _, v := range versions {
		all = append(all, v.Name)
	}
	return append(all, "")
}

func content(t *testing.T, m *transfertest.Image, version string) []byte {
	t.Helper()
	p, err := m.Bytes(version)
	must(t, err)
	return p
}

func exportImage(t *testing.T, m transfer.Image, sum bool) []byte {
	t.Helper()
	var b bytes.Buffer
	_, err := transfer.ExportImage(t.Context(), m, &b, transfer.ExportOptions{Checksum: sum})
	must(t, err)
	return b.Bytes()
}

func importImage(t *testing.T, stream []byte) *transfertest.Image {
	t.Helper()
	p := &transfertest.Pool{Name: "x"}
	_, err := transfer.ImportImage(t.Context(), p, bytes.NewReader(stream), transfer.ImportOptions{})
	must(t, err)
	return p.Get("x")
}

func exportDiff(t *testing.T, m transfer.Image, d transfer.Diff) []byte {
	t.Helper()
	var b bytes.Buffer
	_, err := transfer.ExportDiff(t.Context(), m, d, &b, transfer.ExportOptions{})
	must(t, err)
	return b.Bytes()
}

// sameAsTheirs compares one of our images with one of theirs.
func sameAsTheirs(t *testing.T, c *ceph, image string, m *transfertest.Image) {
	t.Helper()
	have := c.do(t, cmd{"op": "info", "image": image})
	versions, err := m.Versions(t.Context())
	must(t, err)
	var want [][3]any
	for _, v := range versions {
		want = append(want, [3]any{v.Name, float64(v.Size), v.Protected})
	}
	if fmt.Sprint(have.Snaps) != fmt.Sprint(want) {
		t.Fatalf("%s has versions %v, want %v", image, have.Snaps, want)
	}
	for _, v := range names(t, m) {
		if got, want := c.read(t, image, v), content(t, m, v); !bytes.Equal(got, want) {
			t.Fatalf("%s@%s differs: %d and %d bytes", image, v, len(got), len(want))
		}
	}
}

// sameImages compares two of our images.
func sameImages(t *testing.T, got, want *transfertest.Image) {
	t.Helper()
	if !slices.Equal(names(t, got), names(t, want)) {
		t.Fatalf("versions %v, want %v", names(t, got), names(t, want))
	}
	for _, v := range names(t, want) {
		if !bytes.Equal(content(t, got, v), content(t, want, v)) {
			t.Fatalf("version %q differs", v)
		}
	}
}

// Our images and chains of diffs go into theirs, and come back the same.
func oursToTheirs(t *testing.T, c *ceph) {
	for seed := range uint64(6) {
		rng := rand.New(rand.NewPCG(seed, 21))
		m := history(t, rng, rng.IntN(5))
		image := c.name()
		stream := exportImage(t, m, seed%2 == 1)
		c.feed(t, stream, "rbd", "import", "--no-progress", "--export-format", "2", "-", image)
		sameAsTheirs(t, c, image, m)
		if meta := c.do(t, cmd{"op": "info", "image": image}).Meta; meta["mykey"] != "my value" || meta["conf_rbd_cache"] != "false" {
			t.Errorf("seed %d: metadata %v", seed, meta)
		}
		theirs := c.must(t, "rbd", "export", "--no-progress", "--export-format", "2", image, "-")
		back := importImage(t, theirs)
		sameImages(t, back, m)
		if a, b := header(t, back), header(t, m); fmt.Sprint(a) != fmt.Sprint(b) {
			t.Errorf("seed %d: header %+v, want %+v", seed, a, b)
		}
		if again := exportImage(t, back, seed%2 == 1); !bytes.Equal(again, stream) {
			t.Errorf("seed %d: what comes back from them is exported with other bytes (%d and %d)", seed, len(again), len(stream))
		}

		chain := c.name()
		c.must(t, "rbd", "create", "--size", "1", chain)
		from := ""
		for _, v := range names(t, m) {
			d := exportDiff(t, m, transfer.Diff{From: from, To: v, WholeObject: rng.IntN(4) == 0})
			c.feed(t, d, "rbd", "import-diff", "--no-progress", "-", chain)
			from = v
		}
		for _, v := range names(t, m) {
			if !bytes.Equal(c.read(t, chain, v), content(t, m, v)) {
				t.Fatalf("seed %d: %s differs after a chain of our diffs", seed, v)
			}
		}
	}
}

func header(t *testing.T, m transfer.Image) rbdstream.Header {
	t.Helper()
	h, err := m.Header(t.Context())
	must(t, err)
	h.Skipped, h.Summed = 0, false
	return h
}

// scribble makes a history of one of their images.
func scribble(t *testing.T, c *ceph, rng *rand.Rand, image string, size int64, versions int) {
	t.Helper()
	for i := range versions + 1 {
		for range rng.IntN(5) {
			off := rng.Int64N(size)
			n := min(rng.Int64N(1<<(1+rng.IntN(23))), size-off)
			switch rng.IntN(8) {
			case 0:
				size = 1 + rng.Int64N(20<<20)
				c.do(t, cmd{"op": "resize", "image": image, "size": size})
			case 1, 2:
				c.do(t, cmd{"op": "discard", "image": image, "off": off, "n": n})
			default:
				c.do(t, cmd{"op": "write", "image": image, "off": off, "n": n, "seed": rng.IntN(1 << 30)})
			}
		}
		if i < versions {
			c.do(t, cmd{"op": "snap", "image": image, "snap": fmt.Sprintf("s%d", i+1), "protect": rng.IntN(3) == 0})
		}
	}
}

// Their images and chains of diffs go into ours and on into theirs again.
func theirsToOurs(t *testing.T, c *ceph) {
	for seed := range uint64(6) {
		rng := rand.New(rand.NewPCG(seed, 22))
		image, size, versions := c.name(), 1+rng.Int64N(20<<20), rng.IntN(5)
		c.do(t, cmd{"op": "create", "image": image, "size": size})
		scribble(t, c, rng, image, size, versions)
		theirs := c.must(t, "rbd", "export", "--no-progress", "--export-format", "2", image, "-")
		m := importImage(t, theirs)
		sameAsTheirs(t, c, image, m)
		copied := c.name()
		c.feed(t, exportImage(t, m, false), "rbd", "import", "--no-progress", "--export-format", "2", "-", copied)
		sameAsTheirs(t, c, copied, m)

		target := transfertest.New(0)
		from := ""
		for _, v := range names(t, m) {
			args := []string{"export-diff", "--no-progress"}
			if from != "" {
				args = append(args, "--from-snap", from)
			}
			if rng.IntN(4) == 0 {
				args = append(args, "--whole-object")
			}
			spec := image
			if v != "" {
				spec += "@" + v
			}
			d := c.must(t, "rbd", append(args, spec, "-")...)
			if _, err := transfer.ImportDiff(t.Context(), target, bytes.NewReader(d), transfer.ImportOptions{}); err != nil {
				t.Fatalf("seed %d: their diff %s..%s: %v", seed, from, v, err)
			}
			if !bytes.Equal(content(t, target, v), content(t, m, v)) {
				t.Fatalf("seed %d: %s differs after a chain of their diffs", seed, v)
			}
			from = v
		}
	}
}

// An image of theirs that was written in whole pages comes back from us so that
// they export the same bytes.
func aligned(t *testing.T, c *ceph) {
	const page, size = 4096, 12 << 20
	for seed := range uint64(3) {
		rng := rand.New(rand.NewPCG(seed, 27))
		image, copied := c.name(), c.name()
		c.do(t, cmd{"op": "create", "image": image, "size": size})
		c.do(t, cmd{"op": "write", "image": image, "off": 0, "n": size, "seed": 1, "dense": true})
		for i := range 4 {
			for range rng.IntN(6) {
				off := rng.Int64N(size) &^ (page - 1)
				n := min(rng.Int64N(1<<(13+rng.IntN(10)))&^(page-1)+page, size-off)
				c.do(t, cmd{"op": "write", "image": image, "off": off, "n": n, "seed": rng.IntN(1 << 30), "dense": true})
			}
			off := rng.Int64N(size) &^ (page - 1)
			c.do(t, cmd{"op": "discard", "image": image, "off": off, "n": min(64<<10, size-off)})
			c.do(t, cmd{"op": "snap", "image": image, "snap": fmt.Sprint("s", i), "protect": i%2 == 0})
		}
		theirs := c.must(t, "rbd", "export", "--no-progress", "--export-format", "2", image, "-")
		ours := exportImage(t, importImage(t, theirs), false)
		c.feed(t, ours, "rbd", "import", "--no-progress", "--export-format", "2", "-", copied)
		again := c.must(t, "rbd", "export", "--no-progress", "--export-format", "2", copied, "-")
		if !bytes.Equal(again, theirs) {
			t.Errorf("seed %d: they export other bytes (%d and %d)", seed, len(again), len(theirs))
		}
	}
}

// A clone is exported with its parent's data, and goes on from there.
func cloneToOurs(t *testing.T, c *ceph) {
	rng := rand.New(rand.NewPCG(1, 23))
	parent, child := c.name(), c.name()
	const size = 12587000
	c.do(t, cmd{"op": "create", "image": parent, "size": size})
	scribble(t, c, rng, parent, size, 0)
	c.do(t, cmd{"op": "write", "image": parent, "off": 100, "n": 5 << 20, "seed": 7})
	c.do(t, cmd{"op": "resize", "image": parent, "size": size})
	c.do(t, cmd{"op": "snap", "image": parent, "snap": "base", "protect": true})
	c.do(t, cmd{"op": "clone", "image": child, "parent": parent, "snap": "base"})
	scribble(t, c, rng, child, size, 3)
	m := importImage(t, c.must(t, "rbd", "export", "--no-progress", "--export-format", "2", child, "-"))
	sameAsTheirs(t, c, child, m)
	flat := c.name()
	c.feed(t, exportImage(t, m, true), "rbd", "import", "--no-progress", "--export-format", "2", "-", flat)
	sameAsTheirs(t, c, flat, m)
}

// A striped image keeps its layout through us.
func striped(t *testing.T, c *ceph) {
	rng := rand.New(rand.NewPCG(1, 24))
	image, copied := c.name(), c.name()
	c.do(t, cmd{"op": "create", "image": image, "size": 9 << 20, "order": 20, "stripe_unit": 65536, "stripe_count": 4, "features": 63})
	scribble(t, c, rng, image, 9<<20, 2)
	m := importImage(t, c.must(t, "rbd", "export", "--no-progress", "--export-format", "2", image, "-"))
	sameAsTheirs(t, c, image, m)
	c.feed(t, exportImage(t, m, false), "rbd", "import", "--no-progress", "--export-format", "2", "-", copied)
	sameAsTheirs(t, c, copied, m)
	have, want := c.do(t, cmd{"op": "info", "image": copied}), c.do(t, cmd{"op": "info", "image": image})
	if have.StripeUnit != want.StripeUnit || have.StripeCount != want.StripeCount || have.Order != want.Order || have.Features != want.Features {
		t.Errorf("layout %+v, want %+v", have, want)
	}
}

// Raw exports are the same bytes on both sides, by file and by pipe.
func raw(t *testing.T, c *ceph) {
	m := history(t, rand.New(rand.NewPCG(5, 25)), 2)
	image := c.name()
	c.feed(t, exportImage(t, m, false), "rbd", "import", "--no-progress", "--export-format", "2", "-", image)
	for _, v := range names(t, m) {
		spec := image
		if v != "" {
			spec += "@" + v
		}
		theirs := c.must(t, "rbd", "export", "--no-progress", spec, "-")
		s, err := m.Open(t.Context(), v)
		must(t, err)
		var ours bytes.Buffer
		_, err = transfer.ExportRaw(t.Context(), s, &ours, transfer.ExportOptions{})
		must(t, err)
		if !bytes.Equal(ours.Bytes(), theirs) {
			t.Errorf("%s differs", spec)
		}
		path := filepath.Join(t.TempDir(), "ours")
		f, err := transfer.CreateFile(path, transfer.FileOptions{})
		must(t, err)
		_, err = transfer.ExportRaw(t.Context(), s, f, transfer.ExportOptions{})
		must(t, f.Finish(err))
		again := c.name()
		c.must(t, "rbd", "import", "--no-progress", path, again)
		if !bytes.Equal(c.read(t, again, ""), theirs) {
			t.Errorf("%s differs after import of our file", spec)
		}
	}
}

// Our merged diffs are theirs, byte for byte.
func merge(t *testing.T, c *ceph) {
	for seed := range uint64(5) {
		rng := rand.New(rand.NewPCG(seed, 26))
		m := history(t, rng, 3)
		for i, pair := range [][3]string{{"", "s1", "s2"}, {"s1", "s2", "s3"}, {"s2", "s3", ""}} {
			a := exportDiff(t, m, transfer.Diff{From: pair[0], To: pair[1]})
			b := exportDiff(t, m, transfer.Diff{From: pair[1], To: pair[2]})
			dir := t.TempDir()
			pa, pb := filepath.Join(dir, "a"), filepath.Join(dir, "b")
			must(t, os.WriteFile(pa, a, 0o600))
			must(t, os.WriteFile(pb, b, 0o600))
			theirs := c.must(t, "rbd", "merge-diff", "--no-progress", pa, pb, "-")
			var ours bytes.Buffer
			must(t, rbdstream.Merge(&ours, bytes.NewReader(a), bytes.NewReader(b)))
			if !bytes.Equal(theirs, ours.Bytes()) {
				t.Errorf("seed %d, pair %d: their merge has other bytes", seed, i)
			}
			if i == 0 { // and theirs takes ours
				image := c.name()
				c.must(t, "rbd", "create", "--size", "1", image)
				c.feed(t, ours.Bytes(), "rbd", "import-diff", "--no-progress", "-", image)
				if !bytes.Equal(c.read(t, image, "s2"), content(t, m, "s2")) {
					t.Errorf("seed %d: our merged diff does something else there", seed)
				}
			}
		}
	}
}

// What we refuse, they refuse with the number that we tell.
func refusals(t *testing.T, c *ceph) {
	m := transfertest.New(1 << 20)
	must(t, m.Write([]byte("one"), 0))
	must(t, m.Snapshot("s1", false))
	must(t, m.Write([]byte("two"), 8192))
	must(t, m.Snapshot("s2", true))
	first, second := exportDiff(t, m, transfer.Diff{To: "s1"}), exportDiff(t, m, transfer.Diff{From: "s1", To: "s2"})
	image := exportImage(t, m, false)
	long := append([]byte("rbd diff v1\nt\x88\x13\x00\x00"), make([]byte, 5000)...)
	based := c.name()
	c.must(t, "rbd", "create", "--size", "1", based)
	c.feed(t, first, "rbd", "import-diff", "--no-progress", "-", based)
	ours := transfertest.New(1 << 20)
	_, err := transfer.ImportDiff(t.Context(), ours, bytes.NewReader(first), transfer.ImportOptions{})
	must(t, err)
	for name, stream := range map[string][]byte{
		"nothing": nil, "half a banner": first[:5], "only a banner": first[:12], "cut name": first[:15], "cut size": first[:25],
		"cut data": second[:len(second)-3], "no end": second[:len(second)-1], "v2": []byte("rbd diff v2\ne"), "other": []byte("rbd diff v9\ne"),
		"image": image, "snapshot exists": first, "start missing": bytes.Replace(second, []byte("s1"), []byte("sX"), 1), "long name": long,
	} {
		_, status, text := c.run(t, stream, "rbd", "import-diff", "--no-progress", "-", based)
		_, err := transfer.ImportDiff(t.Context(), ours, bytes.NewReader(stream), transfer.ImportOptions{})
		if err == nil || int(rbdstream.Errno(err)) != status {
			t.Errorf("import of a diff, %s: %v (%d), they exit with %d: %s", name, err, rbdstream.Errno(err), status, text)
		}
	}
	for n := 0; n < len(image); n += 1 + n/3 {
		_, status, text := c.run(t, image[:n], "rbd", "import", "--no-progress", "--export-format", "2", "-", c.name())
		_, err := transfer.ImportImage(t.Context(), &transfertest.Pool{}, bytes.NewReader(image[:n]), transfer.ImportOptions{})
		if err == nil || int(rbdstream.Errno(err)) != status {
			t.Errorf("import of %d bytes of an image: %v (%d), they exit with %d: %s", n, err, rbdstream.Errno(err), status, text)
		}
	}
	dir := t.TempDir()
	for name, pair := range map[string][2][]byte{
		"cut": {first[:30], second}, "second cut": {first, second[:40]}, "turned round": {second, first}, "v2": {[]byte("rbd diff v2\ne"), second},
	} {
		pa, pb := filepath.Join(dir, "a"), filepath.Join(dir, "b")
		must(t, os.WriteFile(pa, pair[0], 0o600))
		must(t, os.WriteFile(pb, pair[1], 0o600))
		_, status, text := c.run(t, nil, "rbd", "merge-diff", "--no-progress", pa, pb, "-")
		err := rbdstream.Merge(&bytes.Buffer{}, bytes.NewReader(pair[0]), bytes.NewReader(pair[1]))
		if err == nil || int(rbdstream.Errno(err)) != status {
			t.Errorf("merge, %s: %v (%d), they exit with %d: %s", name, err, rbdstream.Errno(err), status, text)
		}
	}
}

// An image beyond 4 GiB with a discard of 6 GiB: lengths of 33 bits.
func large(t *testing.T, c *ceph) {
	m := transfertest.New(9<<30 + 17)
	must(t, m.Write([]byte("here"), 8<<30))
	for off := int64(0); off < 7<<30; off += 512 << 20 {
		must(t, m.Write([]byte{1}, off))
	}
	must(t, m.Snapshot("s1", false))
	must(t, m.Discard(1<<30, 6<<30))
	must(t, m.Write([]byte("and there"), 9<<30))
	image := c.name()
	c.feed(t, exportImage(t, m, false), "rbd", "import", "--no-progress", "--export-format", "2", "-", image)
	back := importImage(t, c.must(t, "rbd", "export", "--no-progress", "--export-format", "2", image, "-"))
	if !bytes.Equal(exportImage(t, back, false), exportImage(t, m, false)) {
		t.Error("it comes back differently")
	}
	var d bytes.Buffer
	w := rbdstream.NewWriter(&d, rbdstream.WriterOptions{})
	_, _, _, _ = w.To("gone"), w.Size(9<<30), w.Zero(0, 9<<30), w.End()
	c.feed(t, d.Bytes(), "rbd", "import-diff", "--no-progress", "-", image)
	gone := importImage(t, c.must(t, "rbd", "export", "--no-progress", "--export-format", "2", image, "-"))
	if s := exportDiff(t, gone, transfer.Diff{}); len(s) != 12+9+1 {
		t.Errorf("%d bytes are left", len(s))
	}
}
