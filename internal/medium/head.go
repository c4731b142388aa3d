package medium

import (
	"fmt"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// Limits of the head.
const (
	// manifestAfter is how many sealed or abandoned segments the head collects
	// before a manifest takes them over.
	manifestAfter = 32
	// maxListed is where a head takes no more segments, so that it stays small
	// even when no manifest can be written.
	maxListed = 512
)

// The functions below are the steps that a head can take. They are pure: they
// return a new head and leave the old one and its slices alone.

// headRegister adds an unsealed segment with the next ordinal. ErrBusy when the
// head is full.
func headRegister(h catalog.Head, lane catalog.Lane, copyset atoll.CopysetID, size atoll.BlockNo) (catalog.Head, atoll.SegmentID, error) {
	if full(h, lane) {
		return h, atoll.SegmentID{}, fmt.Errorf("register segment %d of medium %v: %d are unsealed: %w", h.Next, h.Medium, len(h.Unsealed), atoll.ErrBusy)
	}
	if len(h.Sealed)+len(h.Dropped) >= maxListed {
		return h, atoll.SegmentID{}, fmt.Errorf("register segment %d of medium %v: head lists %d and waits for a manifest: %w", h.Next, h.Medium, len(h.Sealed)+len(h.Dropped), atoll.ErrBusy)
	}
	if h.Next == 0 || h.Next == ^atoll.Ordinal(0) {
		return h, atoll.SegmentID{}, fmt.Errorf("register segment of medium %v: ordinals are used up: %w", h.Medium, atoll.ErrTooLarge)
	}
	seg := atoll.SegmentID{Medium: h.Medium, Ordinal: h.Next, Copyset: copyset}
	h.Unsealed = append(slices.Clone(h.Unsealed), catalog.Unsealed{Seg: seg, Lane: lane, Size: size})
	h.Next++
	return h, seg, nil
}

// full reports whether a head has no room for another unsealed segment of a lane.
func full(h catalog.Head, lane catalog.Lane) bool {
	n := 0
	for _, u := range h.Unsealed {
		if (u.Lane == catalog.Shards) == (lane == catalog.Shards) {
			n++
		}
	}
	if lane == catalog.Shards {
		return n > 0
	}
	return n >= atoll.MaxUnsealed-1
}

// headSeal moves an unsealed segment to the sealed ones; one of length 0 holds
// nothing and is dropped. Repeating it is no error; another length is ErrSealed.
func headSeal(h catalog.Head, s catalog.Sealed) (catalog.Head, error) {
	if i := sealedAt(h, s.Seg); i >= 0 {
		if h.Sealed[i].Length != s.Length {
			return h, fmt.Errorf("seal segment %v at %d: it is sealed at %d: %w", s.Seg, s.Length, h.Sealed[i].Length, atoll.ErrSealed)
		}
		return h, nil
	}
	i := unsealedAt(h, s.Seg)
	if i < 0 {
		if s.Length == 0 && slices.Contains(h.Dropped, s.Seg) {
			return h, nil
		}
		return h, fmt.Errorf("seal segment %v: not among the unsealed of the head: %w", s.Seg, atoll.ErrNotExist)
	}
	if s.Length == 0 {
		return headAbandon(h, s.Seg)
	}
	s.Lane = h.Unsealed[i].Lane
	h.Unsealed = slices.Delete(slices.Clone(h.Unsealed), i, i+1)
	h.Sealed = append(slices.Clone(h.Sealed), s)
	slices.SortStableFunc(h.Sealed, func(a, b catalog.Sealed) int { return int(int64(a.Seg.Ordinal) - int64(b.Seg.Ordinal)) })
	return h, nil
}

// headAbandon moves a segment that was never used to the dropped ones.
func headAbandon(h catalog.Head, seg atoll.SegmentID) (catalog.Head, error) {
	i := unsealedAt(h, seg)
	if i < 0 {
		if slices.Contains(h.Dropped, seg) {
			return h, nil
		}
		return h, fmt.Errorf("abandon segment %v: not among the unsealed of the head: %w", seg, atoll.ErrNotExist)
	}
	h.Unsealed = slices.Delete(slices.Clone(h.Unsealed), i, i+1)
	h.Dropped = append(slices.Clone(h.Dropped), seg)
	return h, nil
}

// headRecovered records the outcome of a recovery for all unsealed segments.
func headRecovered(h catalog.Head, sealed []catalog.Sealed) (catalog.Head, error) {
	var err error
	for _, s := range sealed {
		if h, err = headSeal(h, s); err != nil {
			return h, err
		}
	}
	if len(h.Unsealed) > 0 {
		return h, fmt.Errorf("recover medium %v: segment %v has no outcome: %w", h.Medium, h.Unsealed[0].Seg, atoll.ErrInvalid)
	}
	return h, nil
}

// headMoved points the head at a new manifest and removes what it took over.
func headMoved(h catalog.Head, manifest catalog.BlockRef, sealed []catalog.Sealed, dropped []atoll.SegmentID) catalog.Head {
	h.Manifest = &manifest
	h.Sealed = slices.DeleteFunc(slices.Clone(h.Sealed), func(s catalog.Sealed) bool {
		return slices.ContainsFunc(sealed, func(t catalog.Sealed) bool { return t.Seg == s.Seg })
	})
	h.Dropped = slices.DeleteFunc(slices.Clone(h.Dropped), func(d atoll.SegmentID) bool { return slices.Contains(dropped, d) })
	return h
}

// headVerified replaces the list of unverified copies of a sealed segment; a
// segment that a manifest has taken over is left alone.
func headVerified(h catalog.Head, seg atoll.SegmentID, still []atoll.NodeID) catalog.Head {
	i := sealedAt(h, seg)
	if i < 0 {
		return h
	}
	h.Sealed = slices.Clone(h.Sealed)
	h.Sealed[i].Unverified = slices.Clone(still)
	return h
}

// headReleased lets go of the medium.
func headReleased(h catalog.Head) catalog.Head {
	h.Process = atoll.UUID{}
	return h
}

func unsealedAt(h catalog.Head, seg atoll.SegmentID) int {
	return slices.IndexFunc(h.Unsealed, func(u catalog.Unsealed) bool { return u.Seg == seg })
}

func sealedAt(h catalog.Head, seg atoll.SegmentID) int {
	return slices.IndexFunc(h.Sealed, func(s catalog.Sealed) bool { return s.Seg == seg })
}

// sameHead reports whether two heads say the same, apart from their revision.
func sameHead(a, b catalog.Head) bool {
	same := a.Medium == b.Medium && a.Epoch == b.Epoch && a.Process == b.Process && a.Next == b.Next &&
		slices.Equal(a.Unsealed, b.Unsealed) && slices.Equal(a.Dropped, b.Dropped) &&
		fromBlockRef(a.Manifest) == fromBlockRef(b.Manifest)
	return same && slices.EqualFunc(a.Sealed, b.Sealed, func(x, y catalog.Sealed) bool {
		return x.Seg == y.Seg && x.Lane == y.Lane && x.Length == y.Length && slices.Equal(x.Unverified, y.Unverified)
	})
}
