package medium

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

var rewrite = flag.Bool("rewrite", false, "write the files in testdata anew")

func sampleManifest() *manifest {
	return &manifest{
		Medium: 0x0123456789abcdef, Epoch: 7, Serial: 9, Mark: Mark{Ordinal: 3, Block: 17, Seq: 4711, Bulk: 5},
		Next: 12, CurParent: 130, Release: 3, LastNumber: 131, Root: []byte("root of the kind"), RootLen: 16,
		First: 1, Chunks: []Ref{{2, 1, 40, 8, 0xabcd}, {}},
		Pages: []pageRef{{0, Ref{2, 1, 50, 1, 0xef}}, {1, Ref{2, 1, 60, 2, 0xfe}}},
	}
}

func sampleVersions() []Version {
	return []Version{{
		Number: 3, Name: "before-the-move", Memo: "safe", Time: time.Unix(0, 1700000000000000000), Parent: 1,
		At: atoll.MakeLocation(2, 77, 0), Seq: 99, Epoch: 5, Size: 1 << 30, Used: 1 << 20, Unique: -1,
		Flags: FlagProtected, Props: map[string]string{"group": "g", "a": ""}, Root: Ref{2, 1, 60, 1, 6}, RootLen: 4000,
	}, {
		Number: 127, Time: time.Unix(0, 1700000000000000001), Parent: 3, Flags: FlagInternal | FlagDeleting,
		Root: Ref{2, 1, 61, 1, 7}, RootLen: 1,
	}}
}

func sampleEntries() []entry {
	return []entry{
		{State: stateLive, Lane: catalog.Hot, Copyset: 1, Length: 16000, Live: 12345, Size: 16384},
		{State: stateDropped, Lane: catalog.Bulk, Copyset: 2},
		{State: stateGone},
		{State: stateLive, Lane: catalog.Bulk, Copyset: 3, Length: 77, Unverified: []atoll.NodeID{4, 5}},
		{State: stateVirtual, Copyset: 3, Length: 77, Remap: Ref{9, 8, 7, 6, 5}, Removed: true},
	}
}

// codedEntries has a coded segment too, which takes version 3.
func codedEntries() []entry {
	return append(sampleEntries(), entry{
		State: stateLive, Lane: catalog.Shards, Code: catalog.Code{Data: 4, Parity: 2}, Copyset: 6, Length: 65536, Size: 65536,
	})
}

func sampleHead() *catalog.Head {
	seg := func(o atoll.Ordinal) atoll.SegmentID { return atoll.SegmentID{Medium: 5, Ordinal: o, Copyset: 3} }
	return &catalog.Head{
		Medium: 5, Epoch: 8, Next: 44, Manifest: &catalog.BlockRef{Seg: seg(40), Block: 3, Blocks: 1, CRC: 77},
		Sealed:   []catalog.Sealed{{Seg: seg(41), Lane: catalog.Bulk, Length: 100, Unverified: []atoll.NodeID{1}}},
		Unsealed: []catalog.Unsealed{{Seg: seg(42), Lane: catalog.Hot, Size: 16384}},
		Dropped:  []atoll.SegmentID{seg(43)},
	}
}

func sampleRemap() *remap {
	return newRemap(5, 3, []move{{70, 10, 10, 0}, {1, 4, 9, 100}, {5, 1, 9, 200}})
}

// golden checks bytes against a file that must be readable for ever.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *rewrite {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("encoding of %s changed", name)
	}
}

func TestFormats(t *testing.T) {
	m := sampleManifest()
	p := m.encode()
	golden(t, "v2.manifest", p)
	if got, err := parseManifest(p); err != nil || !reflect.DeepEqual(got, m) {
		t.Errorf("manifest: %v\n got %+v\nwant %+v", err, got, m)
	}
	p = encodePage(m.Medium, 0, sampleVersions())
	golden(t, "v1.versions", p)
	id, page, versions, err := parsePage(p)
	if err != nil || id != m.Medium || page != 0 || !reflect.DeepEqual(versions, sampleVersions()) {
		t.Errorf("versions: %v %v %v\n got %+v", err, id, page, versions)
	}
	p = encodeChunk(m.Medium, 513, sampleEntries())
	golden(t, "v2.chunk", p)
	id, first, entries, err := parseChunk(p)
	if err != nil || id != m.Medium || first != 513 || !reflect.DeepEqual(entries, sampleEntries()) {
		t.Errorf("chunk: %v %v %v\n got %+v", err, id, first, entries)
	}
	p = encodeChunk(m.Medium, 513, codedEntries())
	golden(t, "v3.chunk", p)
	if _, _, entries, err := parseChunk(p); err != nil || !reflect.DeepEqual(entries, codedEntries()) {
		t.Errorf("chunk: %v\n got %+v", err, entries)
	}
	runs := []Run{{Kind: FirstKind, Key: 1 << 40, Aux: 3, Blocks: 512}, {Kind: 200, Key: 2, Blocks: 1}}
	p = encodeIndex(m.Medium, 77, runs)
	golden(t, "v1.index", p)
	if id, o, recs, err := parseIndex(p); err != nil || id != m.Medium || o != 77 || len(recs) != 2 || recs[0].Key != 1<<40 || recs[1].Kind != 200 {
		t.Errorf("index: %v %d %+v, %v", id, o, recs, err)
	}
	p = encodeNote(sampleHead())
	golden(t, "v1.note", p)
	if got, err := parseNote(p); err != nil || !sameHead(*got, *sampleHead()) {
		t.Errorf("note: %v\n got %+v", err, got)
	}
	p = sampleRemap().encode()
	golden(t, "v2.remap", p)
	if got, err := parseRemap(p); err != nil || !reflect.DeepEqual(got, sampleRemap()) {
		t.Errorf("remap: %v\n got %+v", err, got)
	}
}

// TestOldFormats reads what version 1 wrote.
func TestOldFormats(t *testing.T) {
	read := func(name string) []byte {
		p, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	want := sampleManifest()
	want.CurParent, want.Release, want.LastNumber, want.Pages = 0, 0, 1, nil
	want.Versions = []Version{{
		Number: 1, Name: "release", Memo: "before the move", Time: time.Unix(0, 1700000000000000000), Seq: 99,
		Root: Ref{2, 1, 60, 1, 6}, RootLen: 4096, Unique: -1,
	}}
	if got, err := parseManifest(read("v1.manifest")); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("manifest: %v\n got %+v\nwant %+v", err, got, want)
	}
	entries := sampleEntries()
	entries[0].Size, entries[4].Removed = 0, false
	if _, _, got, err := parseChunk(read("v1.chunk")); err != nil || !reflect.DeepEqual(got, entries) {
		t.Errorf("chunk: %v\n got %+v", err, got)
	}
	if got, err := parseRemap(read("v1.remap")); err != nil || !reflect.DeepEqual(got, sampleRemap()) {
		t.Errorf("remap: %v\n got %+v", err, got)
	}
}

// TestFormatDamage flips every byte in turn: each flip must be noticed.
func TestFormatDamage(t *testing.T) {
	records := map[string][]byte{
		"manifest": sampleManifest().encode(), "chunk": encodeChunk(1, 1, sampleEntries()),
		"note": encodeNote(sampleHead()), "remap": sampleRemap().encode(),
		"versions": encodePage(1, 0, sampleVersions()), "coded": encodeChunk(1, 1, codedEntries()),
		"index": encodeIndex(1, 2, []Run{{Kind: FirstKind, Blocks: 1}}),
	}
	for name, p := range records {
		n := int(le.Uint32(p[12:]))
		for i := range n {
			q := bytes.Clone(p)
			q[i] ^= 0x40
			if err := parseAny(q); err == nil {
				t.Errorf("%s: flip of byte %d went unnoticed", name, i)
			}
		}
		q := bytes.Clone(p)
		q[4] = 9
		le.PutUint32(q[8:], frameCRC(q[:n]))
		if err := parseAny(q); !errors.Is(err, atoll.ErrVersion) {
			t.Errorf("%s: newer version: %v", name, err)
		}
	}
}

func parseAny(p []byte) error {
	var err error
	switch le.Uint32(p) {
	case magicManifest:
		_, err = parseManifest(p)
	case magicChunk:
		_, _, _, err = parseChunk(p)
	case magicNote:
		_, err = parseNote(p)
	case magicVersions:
		_, _, _, err = parsePage(p)
	case magicIndex:
		_, _, _, err = parseIndex(p)
	case magicRemap:
		_, err = parseRemap(p)
	default:
		err = atoll.ErrCorrupt
	}
	return err
}

func FuzzFormats(f *testing.F) {
	f.Add(sampleManifest().encode())
	f.Add(encodeChunk(1, 1, sampleEntries()))
	f.Add(encodeNote(sampleHead()))
	f.Add(sampleRemap().encode())
	f.Add(encodePage(1, 0, sampleVersions()))
	for _, name := range []string{"v1.manifest", "v1.chunk", "v1.remap"} {
		p, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		// Make the frame valid, so that the fuzzer gets at what is inside.
		if len(p) < chunkFixed {
			return
		}
		p = bytes.Clone(p)
		le.PutUint32(p[12:], uint32(len(p)))
		le.PutUint32(p[8:], frameCRC(p))
		if parseAny(p) != nil {
			return
		}
		switch le.Uint32(p) {
		case magicManifest:
			m, _ := parseManifest(p)
			if p[4] == 1 {
				m.Versions = nil // the pages have them now
			}
			if again, err := parseManifest(m.encode()); err != nil || !reflect.DeepEqual(again, m) {
				t.Errorf("manifest does not survive another round: %v", err)
			}
		case magicVersions:
			id, page, vs, _ := parsePage(p)
			if len(vs) == 0 {
				return
			}
			if _, _, again, err := parsePage(encodePage(id, page, vs)); err != nil || !reflect.DeepEqual(again, vs) {
				t.Errorf("versions do not survive another round: %v", err)
			}
		case magicRemap:
			r, _ := parseRemap(p)
			if again, err := parseRemap(r.encode()); err != nil || !reflect.DeepEqual(again.moves(), r.moves()) {
				t.Errorf("remap does not survive another round: %v", err)
			}
		}
	})
}

func TestRemapFind(t *testing.T) {
	r := sampleRemap()
	for _, c := range []struct {
		block atoll.BlockNo
		o     atoll.Ordinal
		at, n atoll.BlockNo
		ok    bool
	}{
		{0, 0, 0, 1, false}, {1, 9, 100, 4, true}, {4, 9, 103, 1, true}, {5, 9, 200, 1, true},
		{6, 0, 0, 64, false}, {79, 10, 9, 1, true}, {80, 0, 0, atoll.MaxSegmentBlocks, false},
	} {
		if o, at, n, ok := r.find(c.block); o != c.o || at != c.at || n != c.n || ok != c.ok {
			t.Errorf("find %d: %v %v %v %v, want %+v", c.block, o, at, n, ok, c)
		}
	}
}
