package cli

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
)

func TestHelperError(t *testing.T) {
	err := helperError("a warning\n"+`{"error":{"code":"NOT_SUPPORTED","message":"no driver: not supported","hint":"load it","exit":1}}`+"\n", os.ErrClosed)
	if err.Error() != "no driver: not supported" || api.Hint(err) != "load it" {
		t.Errorf("told: %v (%s)", err, api.Hint(err))
	}
	for _, kind := range atoll.Kinds() {
		err := helperError(`{"error":{"code":"`+api.KindName(kind)+`","message":"m"}}`, nil)
		if !errors.Is(err, kind) {
			t.Errorf("kind %v came back as %v", kind, errors.Unwrap(err))
		}
	}
	if err := helperError("panic: no\nexit 2\n", os.ErrClosed); !errors.Is(err, atoll.ErrUnavailable) || !strings.Contains(err.Error(), "panic: no") {
		t.Errorf("not JSON: %v", err)
	}
}
