package server

import (
	"errors"
	"fmt"
	"strings"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// Layers below know volumes by their ids. Users know them by their names.

// namedError is an error with another text.
type namedError struct {
	text string
	err  error
}

// Error implements error.
func (e *namedError) Error() string { return e.text }

// Unwrap makes errors.Is see the cause.
func (e *namedError) Unwrap() error { return e.err }

// named has an error name these volumes.
func named(err error, recs ...catalog.Medium) error {
	if err == nil {
		return nil
	}
	var pairs []string
	for _, r := range recs {
		id, name := r.ID.String(), fmt.Sprintf("volume %q", r.Name)
		pairs = append(pairs, "volume "+id, name, "medium "+id, name, id, fmt.Sprintf("%q", r.Name), fmt.Sprintf("medium %q", r.Name), name)
	}
	text := strings.NewReplacer(pairs...).Replace(err.Error())
	if text == err.Error() {
		return err
	}
	return &namedError{text, err}
}

// taken says in users' words that a name is taken; other errors stay.
func taken(what, name string, err error) error {
	if !errors.Is(err, atoll.ErrExist) {
		return err
	}
	return api.WithHint(fmt.Errorf("%s %q: that name is taken: %w", what, name, atoll.ErrExist), "choose another name")
}
