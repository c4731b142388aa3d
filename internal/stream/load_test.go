package stream

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Long reads that are many at once are not taken for those of a slow disk, and
// short ones that take as long are.
func TestLoadOfLongReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for bytes, want := range map[int]bool{1 << 20: false, atoll.BlockSize: true} {
			var l load
			epoch := time.Now()
			for range 50 {
				began := l.begin(epoch)
				time.Sleep(9 * time.Millisecond)
				l.end(epoch, began, bytes)
			}
			if l.slow(epoch) != want {
				t.Errorf("after reads of %d bytes in 9 ms it counts as slow: %v", bytes, !want)
			}
		}
	})
}
