package e2e_test

import (
	"errors"
	"testing"

	"github.com/atollstore/atoll"
)

// A volume that is open in a Go program outlives its server, and the program is
// told when writes may have been lost with that.
func TestGoClient(t *testing.T) {
	s := startServer(t)
	c, err := atoll.Dial(t.Context(), atoll.Options{Server: s.socket(), RetryFor: patience})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Create(t.Context(), "disk", 64<<20, nil); err != nil {
		t.Fatal(err)
	}
	v, err := c.Open(t.Context(), "disk")
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	write := func(text string, off int64) {
		t.Helper()
		if _, err := v.WriteAt([]byte(text), off); err != nil {
			t.Fatal(err)
		}
	}
	read := func(text string, off int64) {
		t.Helper()
		p := make([]byte, len(text))
		if _, err := v.ReadAt(p, off); err != nil || string(p) != text {
			t.Fatalf("read %q, want %q: %v", p, text, err)
		}
	}
	flush := func(want error) {
		t.Helper()
		if err := v.Flush(t.Context()); !errors.Is(err, want) {
			t.Fatalf("flush: %v, want %v", err, want)
		}
	}
	write("kept", 0)
	flush(nil)
	write("perhaps", 8192)
	s.kill()
	done := make(chan struct{})
	go func() {
		defer close(done)
		p := make([]byte, 4)
		if _, err := v.ReadAt(p, 0); err != nil || string(p) != "kept" { // waits for the server
			t.Errorf("read %q: %v", p, err)
		}
	}()
	s.start()
	<-done
	flush(atoll.ErrIO)
	write("again", 8192)
	flush(nil)
	old, err := c.Backup(t.Context(), "disk", "one", nil)
	if err != nil {
		t.Fatal(err)
	}
	view, err := c.Open(t.Context(), old.String())
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	s.stop()
	s.start()
	read("again", 8192)
	read("kept", 0)
	p := make([]byte, 5)
	if _, err := view.ReadAt(p, 8192); err != nil || string(p) != "again" {
		t.Errorf("the version reads %q: %v", p, err)
	}
	flush(nil)
}
