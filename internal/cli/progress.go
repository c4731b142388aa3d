package cli

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Progress shows how far a long task is, on standard error: a bar with rate and
// time left on a terminal, else a line every ten seconds.
type Progress struct {
	w     io.Writer
	name  string
	total atomic.Int64
	tty   bool
	off   bool
	start time.Time
	done  atomic.Int64
	stop  chan struct{}
	wg    sync.WaitGroup
}

// NewProgress starts showing progress of a task of total bytes (0 = unknown).
func (a *App) NewProgress(name string, total int64) *Progress {
	p := &Progress{w: a.Err, name: name, start: time.Now(), stop: make(chan struct{}),
		tty: isTerminal(a.Err) && os.Getenv("TERM") != "dumb", off: a.quiet || a.noProgress}
	p.total.Store(total)
	if p.off {
		return p
	}
	every := 10 * time.Second
	if p.tty {
		every = 100 * time.Millisecond
	}
	p.wg.Go(func() {
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				p.draw(false)
			case <-p.stop:
				return
			}
		}
	})
	return p
}

// Add counts n more bytes. It may be called concurrently.
func (p *Progress) Add(n int64) { p.done.Add(n) }

// Reach tells that done of total is done.
func (p *Progress) Reach(done, total int64) {
	p.total.Store(total)
	p.done.Store(done)
}

// Done ends the display, leaving a last line. Call it once.
func (p *Progress) Done() {
	if p.off {
		return
	}
	close(p.stop)
	p.wg.Wait()
	if p.done.Load() == 0 {
		return // it failed before it began, or there was nothing to do
	}
	p.draw(true)
}

// draw prints the state of things.
func (p *Progress) draw(last bool) {
	done, total := p.done.Load(), p.total.Load()
	took := time.Since(p.start)
	rate := int64(float64(done) / max(took.Seconds(), 0.001))
	tail := fmt.Sprintf("%9s  %9s/s", FormatSize(done), FormatSize(rate))
	if last {
		tail += fmt.Sprintf("  %s", took.Round(10*time.Millisecond))
	} else if total > done && rate > 0 {
		left := time.Duration(float64(total-done) / float64(rate) * float64(time.Second))
		tail += fmt.Sprintf("  %s left", left.Round(time.Second))
	}
	name := p.name
	if len(name) > 20 {
		name = name[:19] + "…"
	}
	part := 1.0
	if total > 0 {
		part = min(1, float64(done)/float64(total))
	}
	if !p.tty {
		fmt.Fprintf(p.w, "%s: %3.0f%% %s\n", name, part*100, strings.Join(strings.Fields(tail), " "))
		return
	}
	const width = 20
	full := int(part * width)
	bar := strings.Repeat("█", full) + strings.Repeat("░", width-full)
	fmt.Fprintf(p.w, "\r\033[K%-10s %s %3.0f%% %s", name, bar, part*100, tail)
	if last {
		fmt.Fprintln(p.w)
	}
}
