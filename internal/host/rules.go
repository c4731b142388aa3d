package host

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Op is a set of operations of FS and File.
type Op uint32

// The operations.
const (
	OpOpen Op = 1 << iota
	OpCreate
	OpRename // compared with the old name
	OpRemove
	OpMkdir
	OpList
	OpSyncDir
	OpLock
	OpSpace
	OpRead
	OpWrite
	OpSync // also the flush in a durable WriteVec
	OpTruncate
	OpPunch

	// OpAny is all of them.
	OpAny = OpPunch<<1 - 1
)

// Rule says what goes wrong, where, and how often. A rule applies to an
// operation in Ops on a name that matches Path, in the range of bytes if one is
// given; Nth, Prob and Times then choose among the operations that apply.
//
// At most one rule with an error or a data fault takes effect on an operation,
// the earliest one; delays add up.
type Rule struct {
	Ops  Op
	Path string // glob of path.Match; without a slash for the last element; "" for all
	// Off and Len restrict reads and writes to those that touch this range; no
	// restriction if Len is 0.
	Off, Len int64
	Nth      int     // only the nth time, from 1; 0 for every time
	Prob     float64 // chance in (0,1); 0 for always
	Times    int     // at most so many times; 0 without limit

	// Err is the kind of error that the operation ends with.
	Err error
	// Delay is waited before the operation.
	Delay time.Duration
	// Flip flips one bit in what is read.
	Flip bool
	// Drop acknowledges a write or sync without doing it.
	Drop bool
	// Misdirect reads another block than asked for, or writes to one.
	Misdirect bool
	// Stale reads what was there before the last write. Only hosttest.Disk.
	Stale bool
}

// Effect is what befalls one operation.
type Effect struct {
	Err                          error
	Delay                        time.Duration
	Flip, Drop, Misdirect, Stale bool
	Rand                         uint64 // for choices within the effect
}

// Rules is a changeable set of rules. It costs one atomic load while empty.
type Rules struct {
	active atomic.Int32
	mu     struct {
		sync.Mutex // guards the fields below
		rng        *rand.Rand
		list       []*ActiveRule
	}
}

// NewRules returns an empty set whose random choices follow from seed.
func NewRules(seed uint64) *Rules {
	r := new(Rules)
	r.mu.rng = rand.New(rand.NewPCG(seed, 0x0072756c6573))
	return r
}

// ActiveRule is a rule in force.
type ActiveRule struct {
	Rule
	rules     *Rules
	seen, hit atomic.Int64
}

// Hits returns how many operations the rule has taken effect on.
func (a *ActiveRule) Hits() int { return int(a.hit.Load()) }

// Remove ends the rule. Operations that wait for its delay go on waiting.
func (a *ActiveRule) Remove() {
	r := a.rules
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, b := range r.mu.list {
		if a == b {
			r.mu.list = append(r.mu.list[:i:i], r.mu.list[i+1:]...)
			r.active.Store(int32(len(r.mu.list)))
			return
		}
	}
}

// Add puts a rule in force.
func (r *Rules) Add(rule Rule) *ActiveRule {
	a := &ActiveRule{Rule: rule, rules: r}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.list = append(r.mu.list, a)
	r.active.Store(int32(len(r.mu.list)))
	return a
}

// Clear ends all rules.
func (r *Rules) Clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.list = nil
	r.active.Store(0)
}

// Match returns what befalls an operation on name and a range of n bytes at
// off; ok is false if nothing does.
func (r *Rules) Match(op Op, name string, off, n int64) (e Effect, ok bool) {
	if r.active.Load() == 0 {
		return Effect{}, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	decided := false
	for _, a := range r.mu.list {
		if !a.applies(op, name, off, n) || !a.chosen(r.mu.rng) {
			continue
		}
		delayOnly := a.Err == nil && !a.Flip && !a.Drop && !a.Misdirect && !a.Stale
		if decided && !delayOnly {
			continue
		}
		a.hit.Add(1)
		ok = true
		e.Delay += a.Delay
		if !delayOnly {
			decided = true
			e.Err, e.Flip, e.Drop, e.Misdirect, e.Stale = a.Err, a.Flip, a.Drop, a.Misdirect, a.Stale
			e.Rand = r.mu.rng.Uint64()
		}
	}
	if e.Err != nil {
		e.Err = fmt.Errorf("%s %s: %w (injected)", op, name, e.Err)
	}
	return e, ok
}

// applies reports whether the rule is about this operation.
func (a *ActiveRule) applies(op Op, name string, off, n int64) bool {
	if a.Ops&op == 0 || !matchName(a.Path, name) {
		return false
	}
	return a.Len == 0 || off < a.Off+a.Len && a.Off < off+n
}

// chosen counts the operation and decides whether it is one to spoil.
func (a *ActiveRule) chosen(rng *rand.Rand) bool {
	seen := a.seen.Add(1)
	if a.Nth > 0 && seen != int64(a.Nth) {
		return false
	}
	if a.Times > 0 && a.hit.Load() >= int64(a.Times) {
		return false
	}
	return a.Prob <= 0 || rng.Float64() < a.Prob
}

// String returns the operation's verb.
func (op Op) String() string {
	names := [...]string{"open", "create", "rename", "remove", "make directory", "list",
		"sync directory", "lock", "ask space of", "read", "write", "sync", "truncate", "punch"}
	for i, name := range names {
		if op == 1<<i {
			return name
		}
	}
	return fmt.Sprintf("operations %#x", uint32(op))
}

// SpaceError returns what Space answers when a rule gives it err: no free
// space for ErrNoSpace, else the error.
func SpaceError(total int64, err error) (int64, int64, error) {
	if errors.Is(err, atoll.ErrNoSpace) {
		return total, 0, nil
	}
	return 0, 0, err
}
