package catalog

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/atollstore/atoll/internal/atoll"
)

const (
	maxElement = 255  // bytes of one element of a name
	maxName    = 1024 // bytes of a whole name
)

// ValidateName checks the name of a medium: elements of 1 to 255 bytes of UTF-8
// between slashes, 1024 bytes in all, with no control character, no "@" (it
// introduces a version), no element "." or "..", and not ending in "cur",
// "last" or "release" (they name versions). The error is of kind ErrInvalid and
// says what is wrong.
func ValidateName(name string) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("name %q: %s: %w", name, fmt.Sprintf(format, args...), atoll.ErrInvalid)
	}
	if name == "" {
		return bad("is empty")
	}
	if len(name) > maxName {
		return fmt.Errorf("name %q…: is longer than %d bytes: %w", name[:32], maxName, atoll.ErrInvalid)
	}
	if !utf8.ValidString(name) {
		return bad("is not UTF-8")
	}
	for _, r := range name {
		if r == '@' {
			return bad("contains \"@\", which introduces a version")
		}
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			return bad("contains a control character")
		}
	}
	elements := strings.Split(name, "/")
	for _, e := range elements {
		switch {
		case e == "":
			return bad("has an empty element; remove the leading, trailing or double \"/\"")
		case len(e) > maxElement:
			return bad("has an element longer than %d bytes", maxElement)
		case e == "." || e == "..":
			return bad("has the element %q", e)
		}
	}
	switch last := elements[len(elements)-1]; last {
	case "cur", "last", "release":
		return bad("ends in %q, which names a version", last)
	}
	return nil
}

// maxVersionName is the longest name of a version in bytes.
const maxVersionName = 255

// ValidateVersionName checks the name of a version: 1 to 255 bytes of UTF-8
// without "/", "@" and control characters, not digits only (they are a number),
// and not "cur", "last" or "release". The error is of kind ErrInvalid and says
// what is wrong.
func ValidateVersionName(name string) error {
	bad := func(what string) error {
		return fmt.Errorf("version name %q: %s: %w", name, what, atoll.ErrInvalid)
	}
	switch {
	case name == "":
		return bad("is empty")
	case len(name) > maxVersionName:
		return fmt.Errorf("version name %q…: is longer than %d bytes: %w", name[:32], maxVersionName, atoll.ErrInvalid)
	case !utf8.ValidString(name):
		return bad("is not UTF-8")
	case strings.ContainsAny(name, "/@"):
		return bad("contains \"/\" or \"@\"")
	case name == "cur" || name == "last" || name == "release":
		return bad("means something else already")
	case name == "." || name == "..":
		return bad("would be a directory's")
	}
	digits := true
	for _, r := range name {
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			return bad("contains a control character")
		}
		digits = digits && r >= '0' && r <= '9'
	}
	if digits {
		return bad("is a number; versions have numbers of their own")
	}
	return nil
}
