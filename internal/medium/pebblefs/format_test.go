package pebblefs

import (
	"bytes"
	"flag"
	"os"
	"reflect"
	"testing"

	"go.uber.org/goleak"

	"github.com/atollstore/atoll/internal/atoll"
)

var rewrite = flag.Bool("rewrite", false, "write the files in testdata anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func sampleOps() []op {
	return []op{
		{code: opMkdir, name: "/db"}, {code: opCreate, id: 1, name: "/db/000001.log"},
		{code: opExtent, id: 1, ext: extent{0, 3, 7, 100}}, {code: opSize, id: 1, size: 9000},
		{code: opLink, name: "/db/000001.log", to: "/db/copy"}, {code: opRename, name: "/db/copy", to: "/db/other"},
		{code: opRemove, name: "/db/other"},
	}
}

func sampleTree(t testing.TB) *tree {
	tr := newTree()
	for _, o := range sampleOps() {
		switch o.code {
		case opExtent:
			tr.byID[o.id].place(o.ext)
		case opSize:
			tr.byID[o.id].logged = o.size
		default:
			if _, err := tr.apply(&o); err != nil {
				t.Fatal(err)
			}
		}
	}
	return tr
}

func encodeOps(ops []op) []byte {
	p := newFrame(magicOps)
	for i := range ops {
		p = appendOp(p, &ops[i])
	}
	return finishFrame(p)
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	if *rewrite {
		if err := os.WriteFile("testdata/"+name, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("encoding of %s changed", name)
	}
}

func TestFormats(t *testing.T) {
	p := encodeOps(sampleOps())
	golden(t, "v1.ops", p)
	if got, err := parseOps(p); err != nil || !reflect.DeepEqual(got, sampleOps()) {
		t.Errorf("operations: %v\n%+v", err, got)
	}
	p = sampleTree(t).encode()
	golden(t, "v1.table", p)
	got, err := parseTable(p)
	if err != nil || !bytes.Equal(got.encode(), p) {
		t.Errorf("table does not survive: %v", err)
	}
	for i := range p {
		q := bytes.Clone(p)
		q[i] ^= 1
		if _, err := parseTable(q); err == nil {
			t.Errorf("flip of byte %d went unnoticed", i)
		}
	}
}

func FuzzFormats(f *testing.F) {
	f.Add(encodeOps(sampleOps()))
	f.Add(sampleTree(f).encode())
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) < frameSize {
			return
		}
		p = finishFrame(bytes.Clone(p))
		if ops, err := parseOps(p); err == nil {
			if again, err := parseOps(encodeOps(ops)); err != nil || !reflect.DeepEqual(again, ops) {
				t.Errorf("operations do not survive another round: %v", err)
			}
		}
		_, _ = parseTable(p)
	})
}

// TestPlace compares runs with a plain array of blocks.
func TestPlace(t *testing.T) {
	ino, model := newInode(1), map[uint64]extent{}
	state := uint64(1)
	next := func(n uint64) uint64 {
		state = state*6364136223846793005 + 1442695040888963407
		return (state >> 33) % n
	}
	live := 0
	for i := range 2000 {
		e := extent{first: next(60), blocks: uint32(1 + next(12)), ordinal: atoll.Ordinal(i + 1), block: 1}
		for _, o := range ino.place(e) {
			live -= int(o.blocks)
		}
		live += int(e.blocks)
		for b := range uint64(e.blocks) {
			model[e.first+b] = e.cut(e.first+b, e.first+b+1)
		}
		if live != len(model) {
			t.Fatalf("%d blocks counted, %d there", live, len(model))
		}
	}
	for b := range uint64(80) {
		e, ok := ino.run(b)
		want, there := model[b]
		if ok != there || ok && e.cut(b, b+1) != want {
			t.Fatalf("block %d: %+v %v, want %+v %v", b, e, ok, want, there)
		}
	}
}
