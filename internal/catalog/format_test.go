package catalog

import (
	"bytes"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// golden lists one record of every kind, with nothing left empty.
func golden() []any {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	seg := atoll.SegmentID{Medium: 5, Ordinal: 6, Copyset: 7}
	return []any{
		&Cluster{ID: atoll.UUID{1}, Name: "c", Level: 1, Created: at},
		&Node{ID: 2, Disk: atoll.UUID{2}, Incarnation: atoll.UUID{3}, Process: atoll.UUID{4}, Addr: "h:1", Host: "h",
			Rack: "r", State: NodeDraining, Created: at},
		&NodeReport{Total: 9, Free: 8, Segments: 7, Open: 6, ReadOnly: true, Full: true, Errors: 5, P99: 4, At: at},
		&Copyset{ID: 3, Nodes: []atoll.NodeID{1, 2, 3}, Version: 4, Retired: true},
		&Process{ID: atoll.UUID{5}, Host: "h", PID: 6, Roles: []string{"node"}, API: "a", NBD: "n", Wire: "w", Version: "v", Started: at},
		&served{Process: atoll.UUID{6}},
		&Medium{ID: 5, Name: "a/b", Kind: KindVolume, State: MediumDeleting, Owner: "o", Size: 4096,
			Policy: Policy{Replicas: 3, MinReplicas: 2, Segment: 100}, Created: at, Props: map[string]string{"k": "v"}},
		&Head{Medium: 5, Epoch: 6, Process: atoll.UUID{7}, Manifest: &BlockRef{Seg: seg, Block: 1, Blocks: 2, CRC: 3}, Next: 8,
			Unsealed: []Unsealed{{Seg: seg, Lane: Bulk, Size: 9}},
			Sealed:   []Sealed{{Seg: seg, Lane: Bulk, Length: 10, Unverified: []atoll.NodeID{11}}},
			Dropped:  []atoll.SegmentID{seg}},
		&Directory{Number: 5, Path: "a/b", Owner: "o", Created: at, Leaving: true},
		&User{Name: "u", Hash: "h", Strict: true, Admin: true, Created: at},
		&Medium{ID: 6, Name: "c", Kind: KindVolume, State: MediumTrashed, Owner: "o", Size: 4096, Policy: Policy{Replicas: 1}, Created: at,
			Parent: &Parent{Medium: 5, Version: 1, Base: 9}, Ancestors: []Ancestor{{Medium: 5, Version: 1, Base: 9}}, Number: 7,
			Trash: &Trash{Removed: at, Expires: at, Source: "user", Bytes: 8}},
		&Schedule{Medium: 7, Spec: "hourly=1", Last: map[string]time.Time{"hourly": at}, NotBefore: at},
	}
}

// TestGolden: what version 1 wrote must be read for ever, and is still written.
func TestGolden(t *testing.T) {
	const path = "testdata/v1.jsonl"
	var out bytes.Buffer
	for _, v := range golden() {
		out.Write(append(encode("0123456789abcdef", v), '\n'))
	}
	raw, err := os.ReadFile(path)
	if err != nil && os.Getenv("ATOLL_TEST_REWRITE") != "" {
		raw, err = out.Bytes(), os.WriteFile(path, out.Bytes(), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(raw, out.Bytes()) {
		t.Errorf("writes\n%swant\n%s", out.Bytes(), raw)
	}
	for i, line := range strings.Split(strings.TrimSpace(string(raw)), "\n") {
		want := golden()[i]
		got := reflect.New(reflect.TypeOf(want).Elem()).Interface()
		if err := decode(KeyValue{Key: "k", Value: []byte(line)}, got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("line %d: %+v, %v, want %+v", i+1, got, err, want)
		}
	}
}

func TestDecodeErrors(t *testing.T) {
	for value, want := range map[string]error{
		"": atoll.ErrCorrupt, "{": atoll.ErrCorrupt, "{}": atoll.ErrCorrupt, "null": atoll.ErrCorrupt,
		`{"v":0,"d":{}}`: atoll.ErrCorrupt, `{"v":1}`: atoll.ErrCorrupt, `{"v":1,"d":[]}`: atoll.ErrCorrupt,
		`{"v":3,"d":{}}`: atoll.ErrVersion, `{"v":99,"d":[],"more":1}`: atoll.ErrVersion, `{"v":1,"d":{"new":1}}`: nil,
	} {
		if err := decode(KeyValue{Key: "k", Value: []byte(value)}, new(Head)); !errors.Is(err, want) {
			t.Errorf("value %q: %v, want %v", value, err, want)
		}
	}
}

// FuzzState feeds arbitrary values to everything that a process loads: no
// panic, and only errors of the kinds that say what is wrong.
func FuzzState(f *testing.F) {
	for _, v := range golden() {
		f.Add("state/node/00000001", encode("w", v))
	}
	for _, key := range []string{"state/cluster", "state/serve/00000001", "state/report/1", "state/copyset/0000000x",
		"state/process/1", "state/elect/a", "state/copies/x", "state/other"} {
		f.Add(key, []byte(`{"v":1,"d":{"id":7}}`))
	}
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		kv := KeyValue{Key: root + key, Value: value, Mod: 2}
		node := KeyValue{Key: nodeKey(1), Value: encode("w", Node{ID: 1}), Mod: 1}
		r := &raw{kvs: map[string]KeyValue{node.Key: node}}
		v, err := newView(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.apply(v, Event{KeyValue: kv}); err != nil && !errors.Is(err, atoll.ErrCorrupt) && !errors.Is(err, atoll.ErrVersion) {
			t.Errorf("key %q: %v", key, err)
		}
		if err := r.apply(v, Event{KeyValue: KeyValue{Key: kv.Key, Mod: 3}, Deleted: true}); err != nil && !errors.Is(err, atoll.ErrCorrupt) {
			t.Errorf("delete key %q: %v", key, err)
		}
		for _, record := range golden() {
			if err := decode(kv, record); err != nil && !errors.Is(err, atoll.ErrCorrupt) && !errors.Is(err, atoll.ErrVersion) {
				t.Errorf("%v", err)
			}
		}
	})
}
