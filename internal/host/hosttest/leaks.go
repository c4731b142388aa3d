package hosttest

import (
	"time"

	"go.uber.org/goleak"
)

// Leaks returns an error that tells of goroutines which do not end, when all
// tests are done. Those of libraries may take some time on a busy machine.
func Leaks(opts ...goleak.Option) error {
	err := goleak.Find(opts...)
	for begun := time.Now(); err != nil && time.Since(begun) < time.Minute; err = goleak.Find(opts...) {
		time.Sleep(100 * time.Millisecond)
	}
	return err
}
