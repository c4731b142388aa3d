package stream

import (
	"fmt"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/wire"
)

// recoverCore is what a recovering owner concludes, for one segment, from the
// answers of its copies to the fence. It is a value without clock or I/O.
//
// The rules (R1–R3), where evidence is an answer of grade Torn or better, or
// Absent, which counts as length 0:
//
//   - wait for all copies; go on without those that cannot be reached when two
//     copies gave evidence, without silent ones after atoll.FenceWait;
//   - with one piece of evidence go on only after that time and only if it is
//     Clean, unless the segment has no other copy;
//   - the longest evidence is the length, unless a copy is sealed already;
//   - complete the other copies with evidence, seal, and list the rest as
//     unverified. Copies that fail in this do not count as evidence any more,
//     and what is left must still suffice.
type recoverCore struct {
	seg     atoll.SegmentID
	nodes   []atoll.NodeID
	copies  [atoll.MaxCopies]recoverCopy
	waited  bool // atoll.FenceWait has passed
	decided bool
	length  atoll.BlockNo
	source  int // a copy that has the whole length
	bugs    Bugs
}

type copyState uint8

const (
	copySilent   copyState = iota // no answer yet
	copyFailed                    // cannot be reached
	copyAnswered                  // tail says what it holds
	copyWhole                     // holds the sealed length
	copySealed                    // and is sealed
)

type recoverCopy struct {
	state copyState
	tail  wire.Tail
	err   error
}

// evidence reports whether the copy's length counts.
func (r *recoverCore) evidence(i int) bool {
	c := &r.copies[i]
	return c.state >= copyAnswered && (c.tail.Grade >= wire.Absent || r.bugs.TrustUnknown)
}

// vouches reports whether the copy's answer would do alone.
func (r *recoverCore) vouches(i int) bool {
	return r.copies[i].tail.Grade == wire.Clean || r.bugs.TrustUnknown
}

func (r *recoverCore) lengthOf(i int) atoll.BlockNo {
	if r.copies[i].tail.Grade == wire.Absent {
		return 0
	}
	return r.copies[i].tail.Length
}

// answered notes what a copy holds, now that it is fenced.
func (r *recoverCore) answered(i int, t wire.Tail) {
	if !r.decided {
		r.copies[i] = recoverCopy{state: copyAnswered, tail: t}
	}
}

// failed notes that a copy cannot be reached, or not be completed or sealed.
func (r *recoverCore) failed(i int, err error) {
	r.copies[i] = recoverCopy{state: copyFailed, err: err}
}

// decide concludes the length if the answers allow it. It returns false to wait
// for more, and an error when waiting is of no use.
func (r *recoverCore) decide() (bool, error) {
	if r.decided {
		return true, nil
	}
	count, clean, silent := 0, 0, 0
	for i := range r.nodes {
		if r.copies[i].state == copySilent {
			silent++
		}
		if r.evidence(i) {
			count++
			if r.vouches(i) {
				clean++
			}
		}
	}
	if silent > 0 && !r.waited {
		return false, nil
	}
	if !r.enough(count, clean) {
		if !r.waited {
			return false, nil
		}
		return false, r.unavailable(count)
	}
	if err := r.choose(); err != nil {
		return false, err
	}
	r.decided = true
	return true, nil
}

// enough is R1.
func (r *recoverCore) enough(count, clean int) bool {
	return count == len(r.nodes) || count >= 2 || count == 1 && clean == 1 && r.waited
}

// choose is R2.
func (r *recoverCore) choose() error {
	r.source = -1
	for i := range r.nodes {
		if !r.evidence(i) {
			continue
		}
		t := &r.copies[i].tail
		if r.source < 0 {
			r.source, r.length = i, r.lengthOf(i)
			continue
		}
		best := &r.copies[r.source].tail
		better := r.lengthOf(i) > r.length
		if r.bugs.Shortest {
			better = r.lengthOf(i) < r.length
		}
		if t.Sealed != best.Sealed {
			better = t.Sealed
		} else if t.Sealed && t.Length != best.Length {
			return fmt.Errorf("recover segment %v: sealed at %d on node %v and at %d on node %v: %w",
				r.seg, best.Length, r.nodes[r.source], t.Length, r.nodes[i], atoll.ErrCorrupt)
		}
		if better {
			r.source, r.length = i, r.lengthOf(i)
		}
	}
	return r.agree()
}

// agree checks that copies of one length hold the same batches. A segment has
// one writer, and recovery only copies, so they must.
func (r *recoverCore) agree() error {
	for i := range r.nodes {
		for j := range i {
			a, b := &r.copies[i].tail, &r.copies[j].tail
			if r.evidence(i) && r.evidence(j) && r.lengthOf(i) == r.lengthOf(j) && r.lengthOf(i) > 0 && a.Sum != b.Sum {
				return fmt.Errorf("recover segment %v: nodes %v and %v hold different batches before block %d: %w",
					r.seg, r.nodes[j], r.nodes[i], a.Length, atoll.ErrCorrupt)
			}
		}
	}
	return nil
}

// targets returns the copies with evidence, the ones to complete and seal.
func (r *recoverCore) targets() []int {
	var list []int
	for i := range r.nodes {
		if r.evidence(i) {
			list = append(list, i)
		}
	}
	return list
}

// short reports whether copy i must be completed before it can be sealed.
func (r *recoverCore) short(i int) bool {
	return r.lengthOf(i) < r.length && !r.bugs.NoWriteBack
}

// conclude returns the copies to list as unverified, when all work on the
// targets is done; an error if too few of them are sealed to go on (R1, R3).
func (r *recoverCore) conclude() ([]atoll.NodeID, error) {
	var unverified []atoll.NodeID
	count, clean := 0, 0
	for i, id := range r.nodes {
		if r.copies[i].state == copySealed {
			count++
			if r.vouches(i) {
				clean++
			}
			continue
		}
		if r.bugs.NoWriteBack && r.evidence(i) || r.bugs.DropSilent {
			continue
		}
		unverified = append(unverified, id)
	}
	if !r.enough(count, clean) {
		return nil, r.unavailable(count)
	}
	return unverified, nil
}

// unavailable names the copies that are missing.
func (r *recoverCore) unavailable(count int) error {
	var missing []string
	for i, id := range r.nodes {
		switch c := &r.copies[i]; {
		case c.state == copySilent:
			missing = append(missing, fmt.Sprintf("node %v is silent", id))
		case c.state == copyFailed:
			missing = append(missing, fmt.Sprintf("node %v: %v", id, c.err))
		case c.tail.Grade < wire.Clean:
			missing = append(missing, fmt.Sprintf("node %v is %v", id, c.tail.Grade))
		}
	}
	missing = slices.Clip(missing)
	return fmt.Errorf("recover segment %v: %d of %d copies can vouch for its length (%v): %w",
		r.seg, count, len(r.nodes), missing, atoll.ErrUnavailable)
}
