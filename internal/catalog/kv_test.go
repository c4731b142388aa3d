package catalog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// kvStore is an implementation under test: two clients of one empty store.
type kvStore struct {
	a, b    KV
	compact func(t *testing.T)
}

// TestKV holds every implementation of KV to its contract.
func TestKV(t *testing.T) {
	t.Run("memory", func(t *testing.T) {
		m := NewMemory(MemoryOptions{})
		defer m.Close()
		suite(t, kvStore{m.Client("a"), m.Client("b"), func(*testing.T) { m.Compact() }})
	})
	t.Run("etcd", func(t *testing.T) {
		dir := privateDir(t)
		socket := filepath.Join(dir, "s", "client.sock")
		s := startEtcd(t, EtcdOptions{Dir: filepath.Join(dir, "etcd"), Name: "one", ClientSocket: socket, Log: testLog(t)})
		defer func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}()
		remote, err := DialEtcd([]string{"unix://" + socket}, nil, testLog(t))
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := remote.Close(); err != nil {
				t.Error(err)
			}
		}()
		suite(t, kvStore{s.KV(), remote, func(t *testing.T) {
			resp, err := s.client.Get(t.Context(), "x")
			if err == nil {
				_, err = s.client.Compact(t.Context(), resp.Header.Revision)
			}
			if err != nil {
				t.Fatal(err)
			}
		}})
	})
}

func suite(t *testing.T, s kvStore) {
	for _, c := range []struct {
		name string
		run  func(t *testing.T, s kvStore)
	}{
		{"txn", kvTxn}, {"limits", kvLimits}, {"range", kvRange}, {"watch", kvWatch},
		{"compaction", kvCompaction}, {"lease", kvLease}, {"expiry", kvExpiry}, {"deadline", kvDeadline},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, s) })
	}
}

func mustTxn(t *testing.T, kv KV, txn Txn) TxnResult {
	t.Helper()
	res, err := kv.Txn(testContext(t), txn)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func wantErr(t *testing.T, err, kind error) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error %v, want %v", err, kind)
	}
}

func kvTxn(t *testing.T, s kvStore) {
	ctx := testContext(t)
	_, err := s.a.Get(ctx, "/txn/a")
	wantErr(t, err, atoll.ErrNotExist)
	first := mustTxn(t, s.a, Txn{
		If:   []Cmp{{Key: "/txn/a"}, {Key: "/txn/b"}},
		Then: []Op{{Key: "/txn/a", Value: []byte("1")}, {Key: "/txn/b", Value: []byte("2")}},
		Read: []string{"/txn/a"},
	})
	if !first.OK || len(first.Got) != 1 || first.Got[0].Mod != 0 || first.Got[0].Key != "/txn/a" {
		t.Fatalf("create: %+v", first)
	}
	kv, err := s.b.Get(ctx, "/txn/b")
	if err != nil || string(kv.Value) != "2" || kv.Mod != first.Rev || kv.Lease != 0 {
		t.Fatalf("get: %+v, %v, want revision %d", kv, err, first.Rev)
	}
	for i, c := range []struct {
		cmp Cmp
		ok  bool
	}{
		{Cmp{Key: "/txn/a"}, false},
		{Cmp{Key: "/txn/a", Rev: first.Rev}, true},
		{Cmp{Key: "/txn/a", Rev: first.Rev - 1}, false},
		{Cmp{Key: "/txn/a", Kind: IfExists}, true},
		{Cmp{Key: "/txn/none", Kind: IfExists}, false},
		{Cmp{Key: "/txn/a", Kind: IfValue, Val: []byte("1")}, true},
		{Cmp{Key: "/txn/a", Kind: IfValue, Val: []byte("2")}, false},
		{Cmp{Key: "/txn/none", Kind: IfValue}, false},
	} {
		res := mustTxn(t, s.b, Txn{If: []Cmp{c.cmp}, Read: []string{"/txn/none", "/txn/a"}})
		if res.OK != c.ok || res.Got[0].Mod != 0 || string(res.Got[1].Value) != "1" {
			t.Errorf("case %d: %+v", i, res)
		}
		if res.Rev != first.Rev {
			t.Errorf("case %d: revision %d after reading, want %d", i, res.Rev, first.Rev)
		}
	}
	res := mustTxn(t, s.b, Txn{
		If:   []Cmp{{Key: "/txn/a", Kind: IfExists}, {Key: "/txn/b"}},
		Then: []Op{{Key: "/txn/a", Delete: true}},
	})
	if _, err := s.a.Get(ctx, "/txn/a"); res.OK || err != nil {
		t.Fatalf("a failed condition did not stop the operations: %+v, %v", res, err)
	}
	res = mustTxn(t, s.b, Txn{
		Then: []Op{{Key: "/txn/a", Delete: true}, {Key: "/txn/b", Value: []byte("3")}, {Key: "/txn/none", Delete: true}},
		Read: []string{"/txn/a", "/txn/b"},
	})
	if !res.OK || string(res.Got[0].Value) != "1" || string(res.Got[1].Value) != "2" {
		t.Fatalf("reads are not from before the operations: %+v", res)
	}
	_, err = s.a.Get(ctx, "/txn/a")
	wantErr(t, err, atoll.ErrNotExist)
	none := mustTxn(t, s.b, Txn{Then: []Op{{Key: "/txn/none", Delete: true}}})
	if none.Rev != res.Rev {
		t.Errorf("deleting nothing moved the revision from %d to %d", res.Rev, none.Rev)
	}
}

func kvLimits(t *testing.T, s kvStore) {
	_, err := s.a.Txn(testContext(t), Txn{Then: []Op{{Key: "/l/a"}, {Key: "/l/a"}}})
	wantErr(t, err, atoll.ErrInvalid)
	var ops []Op
	for i := range maxTxnOps {
		ops = append(ops, Op{Key: fmt.Sprintf("/l/%d", i)})
	}
	mustTxn(t, s.a, Txn{Then: ops})
	_, err = s.a.Txn(testContext(t), Txn{Then: ops, Read: []string{"/l/a"}})
	wantErr(t, err, atoll.ErrTooLarge)
}

func kvRange(t *testing.T, s kvStore) {
	keys := []string{"/range/a", "/range/a/b", "/range/b", "/range/c", "/range/é"}
	for _, k := range keys {
		mustTxn(t, s.a, Txn{Then: []Op{{Key: k, Value: []byte(k)}}})
	}
	mustTxn(t, s.a, Txn{Then: []Op{{Key: "/rangf"}, {Key: "/rang"}}})
	for _, c := range []struct {
		prefix, after string
		limit         int
		want          []string
	}{
		{"/range/", "", 0, keys},
		{"/range/", "", 2, keys[:2]},
		{"/range/", "/range/a", 0, keys[1:]},
		{"/range/", "/range/a", 2, keys[1:3]},
		{"/range/", "/range/aa", 1, keys[2:3]},
		{"/range/", "/range/é", 0, nil},
		{"/range/", "/z", 0, nil},
		{"/range/a", "", 0, keys[:2]},
		{"/none", "", 0, nil},
	} {
		kvs, rev, err := s.b.Range(testContext(t), c.prefix, c.after, c.limit)
		var got []string
		for _, kv := range kvs {
			got = append(got, kv.Key)
			if string(kv.Value) != kv.Key || kv.Mod == 0 || kv.Mod > rev {
				t.Errorf("range %+v: %+v at revision %d", c, kv, rev)
			}
		}
		if err != nil || !slices.Equal(got, c.want) || rev == 0 {
			t.Errorf("range %+v: %v, revision %d, %v", c, got, rev, err)
		}
	}
}

// collect waits for n events.
func collect(t *testing.T, w <-chan WatchBatch, n int) []string {
	t.Helper()
	var out []string
	limit := time.After(time.Minute)
	for len(out) < n {
		select {
		case b, ok := <-w:
			if !ok || b.Err != nil {
				t.Fatalf("watch ended after %v: %v", out, b.Err)
			}
			for _, ev := range b.Events {
				line := fmt.Sprintf("put %s=%s", ev.Key, ev.Value)
				if ev.Deleted {
					line = "delete " + ev.Key
				}
				out = append(out, line)
			}
		case <-limit:
			t.Fatalf("saw only %v", out)
		}
	}
	return out
}

func kvWatch(t *testing.T, s kvStore) {
	first := mustTxn(t, s.a, Txn{Then: []Op{{Key: "/watch/a", Value: []byte("1")}}})
	mustTxn(t, s.a, Txn{Then: []Op{{Key: "/other/a", Value: []byte("1")}, {Key: "/watch/a", Value: []byte("2")}}})
	ctx, cancel := context.WithCancel(testContext(t))
	old, now := s.b.Watch(ctx, "/watch/", first.Rev), s.a.Watch(ctx, "/watch/", first.Rev+2)
	mustTxn(t, s.b, Txn{Then: []Op{{Key: "/watch/a", Delete: true}, {Key: "/watch/b", Value: []byte("3")}}})
	mustTxn(t, s.b, Txn{Then: []Op{{Key: "/watch/c", Value: []byte("4")}}})
	got := collect(t, old, 5)
	slices.Sort(got[2:4]) // within a revision there is no order
	want := []string{"put /watch/a=1", "put /watch/a=2", "delete /watch/a", "put /watch/b=3", "put /watch/c=4"}
	if !slices.Equal(got, want) {
		t.Errorf("watch from %d: %v", first.Rev, got)
	}
	if got := collect(t, now, 3); got[2] != want[4] {
		t.Errorf("watch from %d: %v", first.Rev+2, got)
	}
	cancel()
	for _, w := range []<-chan WatchBatch{old, now} {
		for b := range w {
			if b.Err == nil {
				t.Errorf("unexpected %+v", b)
			}
		}
	}
}

func kvCompaction(t *testing.T, s kvStore) {
	first := mustTxn(t, s.a, Txn{Then: []Op{{Key: "/c/a", Value: []byte("1")}}})
	mustTxn(t, s.a, Txn{Then: []Op{{Key: "/c/a", Value: []byte("2")}}})
	last := mustTxn(t, s.a, Txn{Then: []Op{{Key: "/c/a", Value: []byte("3")}}})
	s.compact(t)
	ctx := testContext(t)
	b, ok := <-s.b.Watch(ctx, "/c/", first.Rev)
	if !ok || !errors.Is(b.Err, atoll.ErrConflict) {
		t.Errorf("watch from before the compaction: %+v, %v", b, ok)
	}
	w := s.b.Watch(ctx, "/c/", last.Rev+1)
	mustTxn(t, s.a, Txn{Then: []Op{{Key: "/c/a", Value: []byte("4")}}})
	if got := collect(t, w, 1); got[0] != "put /c/a=4" {
		t.Errorf("watch after the compaction: %v", got)
	}
}

func kvLease(t *testing.T, s kvStore) {
	ctx := testContext(t)
	id, err := s.a.Grant(ctx, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	mustTxn(t, s.a, Txn{Then: []Op{
		{Key: "/lease/a", Lease: id}, {Key: "/lease/b", Lease: id}, {Key: "/lease/c", Lease: id}}})
	mustTxn(t, s.a, Txn{Then: []Op{{Key: "/lease/b"}}}) // no longer the lease's
	mustTxn(t, s.a, Txn{Then: []Op{{Key: "/lease/c", Delete: true}}})
	if kv, err := s.b.Get(ctx, "/lease/a"); err != nil || kv.Lease != id {
		t.Fatalf("key under lease %x: %+v, %v", id, kv, err)
	}
	for _, kv := range []KV{s.a, s.b} {
		if err := kv.KeepAlive(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.b.Revoke(ctx, id); err != nil {
		t.Fatal(err)
	}
	_, err = s.a.Get(ctx, "/lease/a")
	wantErr(t, err, atoll.ErrNotExist)
	if _, err := s.a.Get(ctx, "/lease/b"); err != nil {
		t.Errorf("a key that left the lease went with it: %v", err)
	}
	for _, kv := range []KV{s.a, s.b} {
		wantErr(t, kv.KeepAlive(ctx, id), atoll.ErrNotExist)
		if err := kv.Revoke(ctx, id); err != nil {
			t.Errorf("revoke again: %v", err)
		}
	}
	_, err = s.a.Txn(ctx, Txn{Then: []Op{{Key: "/lease/d", Lease: id}}})
	wantErr(t, err, atoll.ErrNotExist)
}

// kvExpiry measures that a lease ends neither early nor never.
func kvExpiry(t *testing.T, s kvStore) {
	ctx := testContext(t)
	var id LeaseID
	var res TxnResult
	var start time.Time
	for try := 1; ; try++ { // on a machine that stalls the lease may end too early for us
		var err error
		if id, err = s.a.Grant(ctx, atoll.LeaseTTL); err != nil {
			t.Fatal(err)
		}
		if res, err = s.a.Txn(ctx, Txn{Then: []Op{{Key: "/expiry", Lease: id}}}); err == nil {
			time.Sleep(time.Second)
			start = time.Now()
			err = s.b.KeepAlive(ctx, id)
		}
		if err == nil {
			break
		}
		if try == 5 || !errors.Is(err, atoll.ErrNotExist) {
			t.Fatal(err)
		}
	}
	w := s.b.Watch(ctx, "/expiry", res.Rev+1)
	if got := collect(t, w, 1); got[0] != "delete /expiry" {
		t.Fatal(got)
	}
	took := time.Since(start)
	t.Logf("a lease of %v ended after %v", atoll.LeaseTTL, took)
	if took < atoll.LeaseTTL || took > atoll.LeaseTTL+20*time.Second {
		t.Errorf("a lease of %v ended after %v", atoll.LeaseTTL, took)
	}
	wantErr(t, s.a.KeepAlive(ctx, id), atoll.ErrNotExist)
}

func kvDeadline(t *testing.T, s kvStore) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.a.Txn(ctx, Txn{Then: []Op{{Key: "/deadline"}}})
	wantErr(t, err, atoll.ErrTimeout)
	_, err = s.b.Get(ctx, "/deadline")
	wantErr(t, err, atoll.ErrTimeout)
	_, _, err = s.b.Range(ctx, "/deadline", "", 0)
	wantErr(t, err, atoll.ErrTimeout)
}

func TestDialNobody(t *testing.T) {
	e, err := DialEtcd([]string{"unix:///" + strings.TrimPrefix(privateDir(t), "/") + "/none"}, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = e.Get(ctx, "/a")
	if !errors.Is(err, atoll.ErrTimeout) && !errors.Is(err, atoll.ErrUnreachable) {
		t.Fatalf("got %v", err)
	}
}
