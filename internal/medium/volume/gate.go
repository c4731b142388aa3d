package volume

import (
	"context"
	"fmt"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
)

// gate counts operations that are inside, in two groups, so that one can wait
// for those that began before it without holding up the others. For a moment
// that belongs to no operation it can be shut.
type gate struct {
	mu   sync.Mutex
	gen  int
	n    [2]int
	idle chan struct{}   // closed when a group that is waited for is empty
	shut chan struct{}   // closed when the gate opens again; nil while it is open
	end  <-chan struct{} // closed when it does not open any more; set once
}

// enter lets an operation in, when the gate is open.
func (g *gate) enter(ctx context.Context) (gen int, err error) {
	g.mu.Lock()
	for g.shut != nil {
		open := g.shut
		g.mu.Unlock()
		select {
		case <-open:
		case <-g.end:
			return 0, atoll.ErrClosed
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for a backup: %w: %w", atoll.ErrTimeout, ctx.Err())
		}
		g.mu.Lock()
	}
	gen = g.gen
	g.n[gen]++
	g.mu.Unlock()
	return gen, nil
}

// pass lets in what a shut gate waits for.
func (g *gate) pass() int {
	g.mu.Lock()
	gen := g.gen
	g.n[gen]++
	g.mu.Unlock()
	return gen
}

func (g *gate) exit(gen int) {
	g.mu.Lock()
	g.n[gen]--
	if g.n[gen] == 0 && g.idle != nil {
		close(g.idle)
		g.idle = nil
	}
	g.mu.Unlock()
}

// drain waits for all that entered before. One caller at a time.
func (g *gate) drain(ctx context.Context) error {
	for range 2 {
		g.mu.Lock()
		for g.n[g.gen^1] > 0 {
			if g.idle == nil {
				g.idle = make(chan struct{})
			}
			idle := g.idle
			g.mu.Unlock()
			select {
			case <-idle:
			case <-ctx.Done():
				return fmt.Errorf("wait for writes in flight: %w: %w", atoll.ErrTimeout, ctx.Err())
			}
			g.mu.Lock()
		}
		g.gen ^= 1
		g.mu.Unlock()
	}
	return nil
}

// close keeps operations that come from now on outside until open. One caller
// at a time.
func (g *gate) close() {
	g.mu.Lock()
	g.shut = make(chan struct{})
	g.mu.Unlock()
}

// open lets in who waits.
func (g *gate) open() {
	g.mu.Lock()
	close(g.shut)
	g.shut = nil
	g.mu.Unlock()
}
