package host_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

func TestFaultFS(t *testing.T) {
	hosttest.TestFS(t, func() host.FS { return host.NewFault(hosttest.NewDisk(1)) })
	hosttest.TestFS(t, func() host.FS { return host.NewFault(openDir(t, host.DirOptions{})) })
}

func TestFaultRules(t *testing.T) {
	fs := host.NewFault(hosttest.NewDisk(1))
	f, err := fs.Create("slot")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := fs.Rename("slot", "a.seg"); err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("x"), 8192)
	write := func() error { return f.WriteVec([][]byte{data}, 0, true) }
	for _, c := range []struct {
		rule  host.Rule
		wants error
	}{
		{host.Rule{Ops: host.OpWrite, Path: "*.seg", Err: atoll.ErrIO}, atoll.ErrIO},
		{host.Rule{Ops: host.OpWrite | host.OpCreate, Err: atoll.ErrNoSpace}, atoll.ErrNoSpace},
		{host.Rule{Ops: host.OpSync, Err: atoll.ErrIO}, atoll.ErrIO},
		{host.Rule{Ops: host.OpAny, Path: "other", Err: atoll.ErrIO}, nil},
		{host.Rule{Ops: host.OpWrite, Off: 8192, Len: 4096, Err: atoll.ErrIO}, nil},
		{host.Rule{Ops: host.OpWrite, Nth: 2, Err: atoll.ErrIO}, nil},
	} {
		r := fs.Inject(c.rule)
		if err := write(); !errors.Is(err, c.wants) || (err == nil) != (c.wants == nil) {
			t.Errorf("%+v: %v", c.rule, err)
		}
		r.Remove()
		if err := write(); err != nil {
			t.Errorf("after a rule was removed: %v", err)
		}
	}
	fs.Inject(host.Rule{Ops: host.OpRead, Flip: true})
	got := make([]byte, len(data))
	if _, err := f.ReadAt(got, 0); err != nil || bytes.Equal(got, data) {
		t.Errorf("no bit was flipped: %v", err)
	}
	fs.Heal()
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the flip stays: %v", err)
	}
	fs.Inject(host.Rule{Ops: host.OpSpace, Err: atoll.ErrNoSpace})
	if _, free, err := fs.Space(); err != nil || free != 0 {
		t.Errorf("%d free, %v", free, err)
	}
	fs.Inject(host.Rule{Ops: host.OpRead, Delay: 20 * time.Millisecond})
	start := time.Now()
	if f.ReadAt(got, 0); time.Since(start) < 20*time.Millisecond {
		t.Error("no delay")
	}
}

func TestRuleChances(t *testing.T) {
	r := host.NewRules(1)
	a := r.Add(host.Rule{Ops: host.OpRead, Prob: 0.25, Err: atoll.ErrIO})
	b := r.Add(host.Rule{Ops: host.OpWrite, Times: 3, Err: atoll.ErrIO})
	for range 1000 {
		r.Match(host.OpRead, "x", 0, 1)
		r.Match(host.OpWrite, "x", 0, 1)
	}
	if a.Hits() < 150 || a.Hits() > 350 || b.Hits() != 3 {
		t.Errorf("%d and %d hits", a.Hits(), b.Hits())
	}
}
