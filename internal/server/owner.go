package server

import (
	"context"
	"errors"
	"fmt"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// elsewhere adds to an ErrBusy which server has the volume and what to do.
func (v *volumeSet) elsewhere(ctx context.Context, rec catalog.Medium, err error) error {
	if !errors.Is(err, atoll.ErrBusy) || api.Hint(err) != "" {
		return err
	}
	h, herr := v.s.cat.Head(ctx, rec.ID)
	p, ok := v.s.cat.State().Processes[h.Process]
	if herr != nil || !ok || p.ID == v.s.session().ID() {
		return err
	}
	return api.WithHint(err, fmt.Sprintf("volume %s is open on %s: ask that server (its API is %s), or disconnect its clients; it is free %s later",
		rec.Name, p.Host, p.API, idleClose))
}
