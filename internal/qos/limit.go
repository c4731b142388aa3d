package qos

import (
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Kind says what a limit counts, in the order of Curve's throttle types.
type Kind int

// The kinds of limit.
const (
	IOPSTotal Kind = iota // operations a second
	IOPSRead
	IOPSWrite
	BPSTotal // bytes a second
	BPSRead
	BPSWrite
	// Kinds is how many there are.
	Kinds = iota
)

// kindNames are the names of Curve's throttle types.
func kindNames() [Kinds]string {
	return [Kinds]string{"iops_total", "iops_read", "iops_write", "bps_total", "bps_read", "bps_write"}
}

// String returns the name, such as "iops_total".
func (k Kind) String() string {
	if k < 0 || k >= Kinds {
		return fmt.Sprintf("kind-%d", int(k))
	}
	return kindNames()[k]
}

// ParseKind is the inverse of String.
func ParseKind(s string) (Kind, error) {
	for k, name := range kindNames() {
		if s == name {
			return Kind(k), nil
		}
	}
	return 0, fmt.Errorf("limit %q: want one of %v: %w", s, kindNames(), atoll.ErrInvalid)
}

// Limit bounds a rate. The zero Limit does not.
type Limit struct {
	Rate int64 // a second, in the long run; 0 is no limit
	// Burst is the rate for Length (a second if that is 0) after a time without
	// use; 0 means that there are no bursts.
	Burst  int64
	Length time.Duration
}

// Limits are the limits of one Throttle by Kind.
type Limits [Kinds]Limit

// Check returns ErrInvalid with the reason if the limits make no sense.
func (l Limits) Check() error {
	for k, x := range l {
		var why string
		switch {
		case x.Rate < 0 || x.Burst < 0 || x.Length < 0:
			why = "a value below zero"
		case x.Burst > 0 && x.Rate == 0:
			why = "a burst without a limit"
		case x.Burst > 0 && x.Burst < x.Rate:
			why = "a burst below the limit"
		case x.Length > 0 && x.Burst == 0:
			why = "a length without a burst"
		default:
			continue
		}
		return fmt.Errorf("limit %v=%d burst %d for %v: %s: %w", Kind(k), x.Rate, x.Burst, x.Length, why, atoll.ErrInvalid)
	}
	return nil
}

// Default returns what Curve gives a volume of a size: 30 operations a second for
// each GiB, from 2000 to 26000, and 0.3 MiB a second for each GiB, from 120 to
// 260 MiB, both of reads and writes together.
func Default(size int64) Limits {
	const mib = 1 << 20
	gib := min(size>>30, 1<<20)
	var l Limits
	l[IOPSTotal].Rate = min(max(30*gib, 2000), 26000)
	l[BPSTotal].Rate = min(max(3*mib*gib/10, 120*mib), 260*mib)
	return l
}
