package transfer

import (
	"fmt"
	"io"
)

// Percent shows progress in the manner of rbd: one line that is overwritten
// whenever a whole percent is gained. Its methods are called by one goroutine.
type Percent struct {
	w    io.Writer
	text string
	last int64
}

// NewPercent returns a Percent that writes to w; text says what is done, such as
// "Exporting image". A nil *Percent shows nothing.
func NewPercent(w io.Writer, text string) *Percent { return &Percent{w: w, text: text} }

// Update shows that done of total is done, if that is a percent more than shown
// before. Done may be larger than total, and total zero.
func (p *Percent) Update(done, total int64) {
	if p == nil {
		return
	}
	percent := int64(100)
	if total > 0 {
		percent = int64(float64(min(done, total)) / float64(total) * 100)
	}
	if percent > p.last {
		p.last = percent
		fmt.Fprintf(p.w, "\r%s: %d%% complete...", p.text, percent)
	}
}

// Finish ends the line: done, or failed with the percent reached.
func (p *Percent) Finish(err error) {
	switch {
	case p == nil:
	case err == nil:
		fmt.Fprintf(p.w, "\r%s: 100%% complete...done.\n", p.text)
	default:
		fmt.Fprintf(p.w, "\r%s: %d%% complete...failed.\n", p.text, p.last)
	}
}
