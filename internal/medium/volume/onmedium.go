package volume

import (
	"context"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/stream"
)

// OnMedium returns the Store that a medium is. The caller keeps the medium and
// closes it after the volume.
func OnMedium(m *medium.Medium) Store { return onMedium{m} }

type onMedium struct{ *medium.Medium }

var _ Store = onMedium{}

// NewEntry implements Store.
func (s onMedium) NewEntry() Entry { return new(stream.Entry) }

// Submit implements Store.
func (s onMedium) Submit(ctx context.Context, lane catalog.Lane, e Entry) error {
	se, ok := e.(*stream.Entry)
	if !ok {
		return fmt.Errorf("submit an entry of type %T: %w", e, atoll.ErrInvalid)
	}
	return s.Medium.Submit(ctx, lane, se)
}

// Append implements Store.
func (s onMedium) Append(ctx context.Context, lane catalog.Lane, e Entry) error {
	se, ok := e.(*stream.Entry)
	if !ok {
		return fmt.Errorf("append an entry of type %T: %w", e, atoll.ErrInvalid)
	}
	return s.Medium.Append(ctx, lane, se)
}

// AppendMark implements Store.
func (s onMedium) AppendMark(ctx context.Context, e Entry) (medium.Mark, error) {
	se, ok := e.(*stream.Entry)
	if !ok {
		return medium.Mark{}, fmt.Errorf("append a mark of type %T: %w", e, atoll.ErrInvalid)
	}
	return s.Medium.AppendMark(ctx, se)
}

// LiveBytes returns the bytes that the medium counts as referenced.
func (s onMedium) LiveBytes() int64 { return s.Medium.Stats().Live }
