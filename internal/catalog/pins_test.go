package catalog

import (
	"slices"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
)

// owned makes a medium that a session owns.
func owned(t *testing.T, p pair, s *Session, name string) (Medium, Head) {
	t.Helper()
	m := must(p.a.CreateMedium(p.ctx, volume(name)))(t)
	return m, must(p.a.Acquire(p.ctx, m.ID, s))(t)
}

// catPins: clones and readers keep media from being removed.
func catPins(t *testing.T, p pair) {
	sa, sb := openSession(t, p.a, "a"), openSession(t, p.b, "b")
	defer sa.Close(p.ctx)
	m, h := owned(t, p, sa, "m")
	h.Next = 50
	h = must(p.a.SwapHead(p.ctx, h))(t)

	_, err := p.a.CreateClone(p.ctx, volume("c"), m.ID, 3, h.Epoch+1)
	wantErr(t, err, atoll.ErrFenced)
	_, err = p.a.CreateClone(p.ctx, volume("m"), m.ID, 3, h.Epoch)
	wantErr(t, err, atoll.ErrExist)
	odd := volume("c")
	odd.Kind, odd.Size = KindFS, 0
	_, err = p.a.CreateClone(p.ctx, odd, m.ID, 3, h.Epoch)
	wantErr(t, err, atoll.ErrInvalid)
	_, err = p.a.CreateMedium(p.ctx, Medium{Name: "c", Kind: KindVolume, Size: 4096, Parent: &Parent{Medium: m.ID}})
	wantErr(t, err, atoll.ErrInvalid)

	c := must(p.a.CreateClone(p.ctx, volume("c"), m.ID, 3, h.Epoch))(t)
	if *c.Parent != (Parent{m.ID, 3, 50}) || !slices.Equal(c.Ancestors, []Ancestor{{m.ID, 3, 50}}) || c.Base() != 50 {
		t.Fatalf("clone: %+v", c)
	}
	ch := must(p.a.Acquire(p.ctx, c.ID, sa))(t)
	if ch.Next != 50 {
		t.Fatalf("a clone's ordinals begin at %d", ch.Next)
	}
	ch.Next = 70
	ch = must(p.a.SwapHead(p.ctx, ch))(t)
	d := must(p.a.CreateClone(p.ctx, volume("d"), c.ID, 1, ch.Epoch))(t)
	if !slices.Equal(d.Ancestors, []Ancestor{{m.ID, 3, 50}, {c.ID, 1, 70}}) {
		t.Fatalf("clone of a clone: %+v", d)
	}

	pin := must(p.b.PinVersion(p.ctx, sb, m.ID, 3))(t)
	again := must(p.b.PinVersion(p.ctx, sb, m.ID, 3))(t)
	must(p.b.PinVersion(p.ctx, sb, m.ID, 1<<40))(t)
	pins := must(p.a.Pins(p.ctx, m.ID))(t)
	if len(pins) != 4 || pins[0].Clone != c.ID || pins[1].Process != sb.ID() || pins[3].Version != 1<<40 {
		t.Fatalf("pins: %+v", pins)
	}
	for range 2 {
		if err := p.b.Unpin(p.ctx, pin); err != nil {
			t.Fatal(err)
		}
	}
	if pins = must(p.b.Pins(p.ctx, m.ID))(t); len(pins) != 3 || pins[1] != again {
		t.Fatalf("pins: %+v, want %+v", pins, again)
	}

	m.State = MediumDetached
	m = must(p.a.UpdateMedium(p.ctx, m))(t)
	_, err = p.b.PinVersion(p.ctx, sb, m.ID, 3)
	wantErr(t, err, atoll.ErrNotExist)
	_, err = p.a.CreateClone(p.ctx, volume("late"), m.ID, 3, h.Epoch)
	wantErr(t, err, atoll.ErrNotExist)
	m.State = MediumDeleting
	_, err = p.a.UpdateMedium(p.ctx, m)
	wantErr(t, err, atoll.ErrBusy)
	if err := sb.Close(p.ctx); err != nil { // readers' pins end with their session
		t.Fatal(err)
	}
	_, err = p.b.PinVersion(p.ctx, sb, c.ID, 3)
	wantErr(t, err, atoll.ErrFenced)
	if pins = must(p.a.Pins(p.ctx, m.ID))(t); len(pins) != 1 || pins[0].Clone != c.ID {
		t.Fatalf("pins: %+v", pins)
	}
	_, err = p.a.UpdateMedium(p.ctx, m)
	wantErr(t, err, atoll.ErrBusy)

	// A clone that needs nothing of its parents any more.
	lone := d
	lone.Parent = nil
	_, err = p.a.UpdateMedium(p.ctx, lone)
	wantErr(t, err, atoll.ErrInvalid)
	lone.Ancestors = nil
	must(p.a.UpdateMedium(p.ctx, lone))(t)
	if pins = must(p.a.Pins(p.ctx, c.ID))(t); len(pins) != 0 {
		t.Fatalf("pins of a parent that is not needed: %+v", pins)
	}
	for _, st := range []MediumState{MediumDetached, MediumDeleting} {
		c.State = st
		c = must(p.a.UpdateMedium(p.ctx, c))(t)
	}
	if err := p.a.RemoveMedium(p.ctx, c.ID); err != nil {
		t.Fatal(err)
	}
	must(p.a.UpdateMedium(p.ctx, m))(t)
	if err := p.a.RemoveMedium(p.ctx, m.ID); err != nil {
		t.Fatal(err)
	}
}

func TestVersionNames(t *testing.T) {
	for _, name := range []string{"a", "monday", "1st", "ä b", "v1.0", "-", "...", "before the move"} {
		if err := ValidateVersionName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", "a/b", "a@b", "12", "cur", "last", "release", ".", "..", "a\nb", "\xff", string(make([]byte, 256))} {
		wantErr(t, ValidateVersionName(name), atoll.ErrInvalid)
	}
}

func TestParsePin(t *testing.T) {
	for _, key := range []string{"", pinPrefix, pinPrefix + "0000000000000001/0000000000000002/x1", pinPrefix + "0000000000000001/2/m0000000000000001",
		pinPrefix + "0000000000000001/0000000000000002/m1", pinPrefix + "0000000000000001/0000000000000002/p12-34"} {
		_, err := parsePin(key)
		wantErr(t, err, atoll.ErrCorrupt)
	}
}
