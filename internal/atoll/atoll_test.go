package atoll

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"testing"
)

// Every id reads back from its text.
func TestIDsRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		m := MediumID(rng.Uint64() | 1)
		if got, err := ParseMediumID(m.String()); got != m || err != nil {
			t.Fatalf("%v reads as %v, %v", m, got, err)
		}
		s := SegmentID{m, Ordinal(rng.Uint32()), CopysetID(rng.Uint32())}
		if got, err := ParseSegmentID(s.String()); got != s || err != nil {
			t.Fatalf("%v reads as %v, %v", s, got, err)
		}
		var u, back UUID
		for i := range u {
			u[i] = byte(rng.Uint32())
		}
		text, err := json.Marshal(struct {
			U UUID
			M MediumID
		}{u, m})
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			U UUID
			M MediumID
		}
		if err := json.Unmarshal(text, &got); err != nil || got.U != u || got.M != m {
			t.Fatalf("%s reads as %+v, %v", text, got, err)
		}
		if err := back.UnmarshalText([]byte(u.String())); err != nil || back != u {
			t.Fatalf("%v reads as %v, %v", u, back, err)
		}
	}
}

func TestIDsRefuse(t *testing.T) {
	for _, text := range []string{"", "0", "0000000000000000", "12345678", "x234567812345678", "12345678123456781", "-234567812345678"} {
		if m, err := ParseMediumID(text); !errors.Is(err, ErrInvalid) {
			t.Errorf("medium %q reads as %v, %v", text, m, err)
		}
	}
	for _, text := range []string{"", "1-2-3", "1234567812345678-00000001", "1234567812345678-00000001-0000000g", "1234567812345678-00000001-00000001-", "1234567812345678-00000001-000000011"} {
		if s, err := ParseSegmentID(text); !errors.Is(err, ErrInvalid) {
			t.Errorf("segment %q reads as %v, %v", text, s, err)
		}
	}
	for _, text := range []string{"", "00", "0000000000000000000000000000000g", "000000000000000000000000000000000"} {
		var u UUID
		if err := u.UnmarshalText([]byte(text)); !errors.Is(err, ErrInvalid) {
			t.Errorf("uuid %q reads as %v, %v", text, u, err)
		}
	}
}

// A location gives back what it was made of, and compares by age alone.
func TestLocation(t *testing.T) {
	l := MakeLocation(7, MaxSegmentBlocks-1, 0xbeef)
	if l.Ordinal() != 7 || l.Block() != MaxSegmentBlocks-1 || l.Check() != 0xbeef {
		t.Errorf("%x: %d %d %x", uint64(l), l.Ordinal(), l.Block(), l.Check())
	}
	if a, b := MakeLocation(7, 5, 0xffff), MakeLocation(7, 6, 0); !a.Before(b) || b.Before(a) || a.Before(MakeLocation(7, 5, 0)) {
		t.Error("check bits take part in the comparison")
	}
	if l.String() == "" || (SegmentID{}).IsZero() == l.Before(l) {
		t.Error("zero values")
	}
}

// Kinds are distinct, have distinct texts, and none wraps another.
func TestKinds(t *testing.T) {
	texts := map[string]bool{}
	for i, k := range Kinds() {
		if k == nil || texts[k.Error()] {
			t.Errorf("kind %d: %v", i, k)
			continue
		}
		texts[k.Error()] = true
		for j, other := range Kinds() {
			if i != j && errors.Is(k, other) {
				t.Errorf("%v is %v", k, other)
			}
		}
	}
}
