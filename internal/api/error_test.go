package api

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
)

// Every kind of error crosses the API and comes back as itself, with its hint.
func TestErrorsRoundTrip(t *testing.T) {
	for _, k := range atoll.Kinds() {
		sent := WithHint(fmt.Errorf("open volume disk1: %w", k), "try something else")
		got := fromConnect(toConnect(sent))
		if !errors.Is(got, k) {
			t.Errorf("%v came back as %v", sent, got)
		}
		if got.Error() != sent.Error() {
			t.Errorf("text %q came back as %q", sent, got)
		}
		if Hint(got) != "try something else" {
			t.Errorf("hint of %v came back as %q", k, Hint(got))
		}
	}
	if len(kinds) != len(atoll.Kinds()) {
		t.Errorf("table has %d kinds, package atoll %d", len(kinds), len(atoll.Kinds()))
	}
}

// An error of no kind keeps its text and is not taken for another.
func TestUnknownError(t *testing.T) {
	got := fromConnect(toConnect(errors.New("strange")))
	if !strings.Contains(got.Error(), "strange") || KindName(got) != "INTERNAL" {
		t.Errorf("got %v (%s)", got, KindName(got))
	}
}

// A directory that others may write to, or a link, is not trusted.
func TestCheckPrivate(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		mode os.FileMode
		ok   bool
	}{{0o700, true}, {0o755, true}, {0o777, false}, {0o770, false}} {
		if err := os.Chmod(dir, c.mode); err != nil {
			t.Fatal(err)
		}
		if err := CheckPrivate(dir); (err == nil) != c.ok {
			t.Errorf("mode %v: %v", c.mode, err)
		}
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if err := CheckPrivate(link); !errors.Is(err, atoll.ErrDenied) {
		t.Errorf("a link: %v", err)
	}
}
