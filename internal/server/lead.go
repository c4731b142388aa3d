package server

import (
	"context"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// leadEvery is how often the leader looks at the trash and the schedules.
const leadEvery = 2 * time.Second

// leads reports whether this process is the elected controller.
func (s *Server) leads() bool {
	id := s.session().ID()
	return s.cat.State().Leaders["controller"] == id && s.session().Valid()
}

// lead does what one server of the cluster does for all: it empties the trash
// and makes the versions that schedules ask for. Two that believe to lead do no
// harm: what each does is one transaction, or at worst a version too many.
func (s *Server) lead(ctx context.Context, b *backend) {
	t := time.NewTicker(leadEvery)
	defer t.Stop()
	var room scarcity
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if !s.leads() {
			s.noteTrash(nil)
			room = scarcity{}
			continue
		}
		pass, done := context.WithTimeout(ctx, time.Minute)
		if err := b.expireTrash(pass, time.Now(), &room); err != nil && ctx.Err() == nil {
			s.log.Warn("trash not emptied", "err", err)
		}
		if err := b.runSchedules(pass, time.Now()); err != nil && ctx.Err() == nil {
			s.log.Warn("scheduled versions not made; tried again in a minute", "err", err)
		}
		done()
	}
}

// noteTrash keeps what is in the trash for the metrics; nil: not known.
func (s *Server) noteTrash(all map[atoll.MediumID]catalog.Trash) {
	var bytes int64
	for _, t := range all {
		bytes += t.Bytes
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.trash, s.mu.trashBytes, s.mu.trashKnown = int64(len(all)), bytes, all != nil
}
